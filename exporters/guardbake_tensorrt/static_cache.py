"""A key/value cache of fixed size, written in place, instead of one that grows by Concat.

A growing cache has other shapes at every call and is copied whole; a static one keeps its shape and
its memory, and the engine writes the new columns only. What changes for the caller:

    attention_mask        [B, C] int64  by column of the cache: 1 for a real token, those of this
                                        call included; columns not yet written do not matter
    write_indices         [B] int32     new: the column of each row's first token of this call, so
                                        that write_indices + S <= C
    past_key_values.N.*   [B, K, C, D]  finite at first, say zeros; then
    present.N.*           [B, K, C, D]  in the same memory, the next call's past

with B rows, S tokens a call and C tokens of capacity. All else is as in the growing graph, what the
guard takes and gives included. Rows padded on the left, as batches are everywhere in guardbake,
stay right, and each row may be written from an index of its own.

Why attention has an explicit mask, although TensorRT can count keys by itself (`kv_lengths` with
`causal_kind`): it counts from column 0 on, which is where a left-padded row has its padding. The
operator takes a mask or a causal kind, never both.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from guardbake.errors import UnsupportedError
from guardbake.passes.functions import DOMAIN as GUARD_DOMAIN

from guardbake_tensorrt.cache_values import PREFIX, CacheValues
from guardbake_tensorrt.causal_mask import require_causal
from guardbake_tensorrt.native import (
    ATTENTION,
    CACHE_UPDATE,
    DECOMPOSABLE,
    NATIVE_DOMAIN,
    attention_function,
    cache_update_function,
)

_TOKENS: Final = 2  # axis of keys and values [B, K, S, D]


@dataclass(frozen=True)
class _Join:
    """A Concat that appends a layer's new keys, or values, to those of its cache.

    batch, tokens: what the graph calls the sizes of `past`. fixed: heads and width of a head.
    """

    node: ir.Node
    past: ir.Value
    new: ir.Value
    present: ir.Value
    batch: str
    tokens: str
    fixed: tuple[int, int]


@dataclass(frozen=True)
class _Layer:
    """One layer's attention: what it reads, and the scale of its scores."""

    node: ir.Node
    query: ir.Value
    dtype: ir.DataType
    mask: ir.Value
    keys: _Join
    values: _Join
    scale: float


def use_static_cache(model: ir.Model, capacity: int, where: Path) -> tuple[str, ...]:
    """Rewrite a decoder with a growing cache, in place, for a cache of `capacity` tokens.

    Returns the names of the attention nodes that no fused kernel takes (float32), marked so that
    TensorRT may decompose them. Raises UnsupportedError, and leaves a model of no use, unless every
    attention reads keys and values that a Concat appended to a graph input and that are a graph
    output, under a causal mask (see `causal_mask`), and nothing else reads either.
    """
    graph = model.graph
    layers = [_layer(node, where) for node in graph if _is(node, "Attention")]
    inputs = {str(value.name): value for value in graph.inputs}
    attention_mask, embeds = inputs.get("attention_mask"), inputs.get("inputs_embeds")
    if not layers or attention_mask is None or embeds is None:
        raise _refused(f"{len(layers)} Attention nodes and inputs {sorted(inputs)[:3]}", where)
    sizes = (layers[0].keys.batch, layers[0].keys.tokens, _symbol(embeds, 1, where))
    for mask in {layer.mask: None for layer in layers}:
        require_causal(graph, mask, sizes, where)
    new = CacheValues(graph, attention_mask, embeds, capacity)
    for layer in layers:
        _rewrite(graph, layer, new)
    for node in graph:
        for index, value in enumerate(node.inputs):
            if node.domain == GUARD_DOMAIN and value is attention_mask:
                node.replace_input_with(index, new.guard_mask)
    common.RemoveUnusedNodesPass()(model)
    _refuse_leftovers(graph, new, where)
    opset = model.opset_imports[""]
    for function in (attention_function(opset), cache_update_function(opset)):
        model.functions[function.identifier()] = function
    model.opset_imports[NATIVE_DOMAIN] = 1
    return tuple(str(each.node.name) for each in layers if each.dtype == ir.DataType.FLOAT)


def _is(node: ir.Node, op_type: str) -> bool:
    return node.op_type == op_type and node.domain in ("", "ai.onnx")


def _layer(node: ir.Node, where: Path) -> _Layer:
    if len(node.inputs) != 4 or len(node.outputs) != 1:
        raise _refused(f"node {node.name!r} with a cache or lengths of its own", where)
    query, keys, values, mask = node.inputs
    settings = ("is_causal", "softcap", "q_num_heads", "qk_matmul_output_mode")
    if any(name in node.attributes and node.attributes[name].value for name in settings):
        raise _refused(f"node {node.name!r} with one of {settings}", where)
    if query is None or query.dtype is None or mask is None:
        raise _refused(f"node {node.name!r} without mask or without dtype", where)
    joins = (_join(keys, node, where), _join(values, node, where))
    scale = node.attributes.get("scale")
    width = joins[0].fixed[1]
    factor = 1.0 / float(np.sqrt(width)) if scale is None else scale.as_float()
    return _Layer(node, query, query.dtype, mask, *joins, factor)


def _join(present: ir.Value | None, reader: ir.Node, where: Path) -> _Join:
    node = None if present is None else present.producer()
    if present is None or node is None or not _is(node, "Concat") or len(node.inputs) != 2:
        raise _refused(f"node {reader.name!r} whose keys or values no Concat makes", where)
    past, new = node.inputs
    axis = node.attributes["axis"].as_int() % 4
    if past is None or new is None or not past.is_graph_input() or axis != _TOKENS:
        raise _refused(f"node {node.name!r} that appends to no cache of the graph", where)
    if not present.is_graph_output() or any(use.node is not reader for use in present.uses()):
        raise _refused(f"{present.name!r}, which is not for the next call and attention", where)
    heads, width = (past.shape[axis] if past.shape is not None else None for axis in (1, 3))
    if not isinstance(heads, int) or not isinstance(width, int):
        raise _refused(f"{past.name!r} of shape {past.shape}", where)
    batch, tokens = (_symbol(past, axis, where) for axis in (0, _TOKENS))
    return _Join(node, past, new, present, batch, tokens, (heads, width))


def _symbol(value: ir.Value, axis: int, where: Path) -> str:
    """The name of a dynamic size."""
    size = value.shape[axis] if value.shape is not None and len(value.shape) > axis else None
    if not isinstance(size, ir.SymbolicDim) or size.value is None:
        raise _refused(f"{value.name!r} of shape {value.shape}", where)
    return str(size.value)


def _rewrite(graph: ir.Graph, layer: _Layer, new: CacheValues) -> None:
    old = layer.node
    keys, values = (_update(graph, join, new) for join in (layer.keys, layer.values))
    attention = ir.node(
        ATTENTION,
        [_scaled(graph, layer, new), keys, values, new.mask],
        attributes={DECOMPOSABLE: 1} if layer.dtype == ir.DataType.FLOAT else None,
        domain=NATIVE_DOMAIN,
        name=old.name,
    )
    graph.insert_before(old, attention)
    _take_over(old.outputs[0], attention.outputs[0])
    for node in (old, layer.keys.node, layer.values.node):
        graph.remove(node, safe=True)


def _update(graph: ir.Graph, join: _Join, new: CacheValues) -> ir.Value:
    """The join's output, [B, K, C, D], written in place of being appended."""
    heads, width = join.fixed
    join.past.shape = ir.Shape([join.batch, heads, new.capacity, width])
    inputs = [join.past, join.new, new.write_indices]
    node = ir.node(CACHE_UPDATE, inputs, domain=NATIVE_DOMAIN, name=join.node.name)
    graph.insert_before(join.node, node)
    written = node.outputs[0]
    graph.outputs[list(graph.outputs).index(join.present)] = written
    _take_over(join.present, written)
    written.shape = join.past.shape
    return written


def _scaled(graph: ir.Graph, layer: _Layer, new: CacheValues) -> ir.Value:
    """The query times the scale, which `TRT_Attention` leaves to its caller."""
    scale = np.array(layer.scale, layer.dtype.numpy())
    factor = new.constant(f"{layer.node.name}/scale", scale)
    node = ir.node("Mul", [layer.query, factor], name=f"{PREFIX}/{layer.node.name}/Mul")
    graph.insert_before(layer.node, node)
    scaled = node.outputs[0]
    scaled.name = f"{node.name}/output_0"
    scaled.type, scaled.shape = layer.query.type, layer.query.shape
    return scaled


def _take_over(old: ir.Value, new: ir.Value) -> None:
    """Everything that read `old` reads `new`, which is called the same."""
    new.type, new.shape = old.type, old.shape
    ir.convenience.replace_all_uses_with(old, new)
    name, old.name = old.name, None
    new.name = name


def _refuse_leftovers(graph: ir.Graph, new: CacheValues, where: Path) -> None:
    """Whatever else reads the cache or the mask would read other sizes now."""
    for value in graph.inputs:
        sizes = list(value.shape or ())
        resized = value is new.attention_mask or (len(sizes) == 4 and sizes[2] == new.capacity)
        for use in value.uses() if resized else ():
            node = use.node
            own = node.domain == NATIVE_DOMAIN or str(node.name).startswith(PREFIX)
            end = node.attributes.get("end")
            batch_alone = node.op_type == "Shape" and end is not None and end.as_int() == 1
            if not own and not batch_alone:
                raise _refused(f"node {node.name!r} that reads {value.name!r} too", where)


def _refused(found: str, where: Path) -> UnsupportedError:
    return UnsupportedError(
        found=found,
        expected="a decoder as guardbake exports it: Concat appends to the cache, Attention reads",
        where=str(where),
        remedy="keep the growing cache for this graph",
    )
