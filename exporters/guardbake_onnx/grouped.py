"""Let a decoder attend by onnxruntime's GroupQueryAttention, which knows how long the cache is.

With it a loop may hand in one buffer of the longest length as a layer's past and present, and
nothing is copied from step to step. The operator is causal by itself, and takes the real tokens of
a row to stand in front of its padding.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from guardbake_onnx.operators import Operators

_DOMAIN = "com.microsoft"
_ATTENTION = "Attention"
_SWAPPED = [0, 2, 1, 3]  # heads and tokens


def attends_alike(model: ir.Model) -> bool:
    """Whether all layers of a decoder attend to the same tokens."""
    return len({node.inputs[3] for node in model.graph if node.op_type == _ATTENTION}) == 1


def group_attention(model: ir.Model) -> None:
    """Replace every Attention of a decoder of ours whose layers attend to all that came before.

    Requires: `attends_alike`, and of each layer past_key_values.N.* and its new keys and values
    joined to present.N.*, as `capture_decoder` leaves it. Leaves: the same function of rows without
    padding; the mask is the operator's own.
    """
    graph = model.graph
    first = graph[0]
    mask = next(value for value in graph.inputs if value.name == "attention_mask")
    ops = Operators("lengths")
    numbers = ops("ReduceSum", mask, [1], keepdims=0)
    last = ops("Cast", ops("Sub", numbers, 1), to=int(ir.DataType.INT32))
    most = ops("Shape", mask, start=1, end=2)
    lengths = last, ops("Cast", most, to=int(ir.DataType.INT32))
    ops.insert(graph, first)
    for number, node in enumerate([n for n in graph if n.op_type == _ATTENTION]):
        _replace(graph, node, lengths, Operators(f"grouped.{number}"))
    model.opset_imports[_DOMAIN] = 1
    RemoveUnusedNodesPass()(model)


def _replace(
    graph: ir.Graph, node: ir.Node, lengths: tuple[ir.Value, ir.Value], ops: Operators
) -> None:
    query, *stored = (value for value in node.inputs[:3] if value is not None)
    past, new = zip(*(_joined(value) for value in stored), strict=True)
    heads, size = (_size(query, axis) for axis in (1, 3))
    attended, *present = ops.several(
        "GroupQueryAttention",
        3,
        *(_flat(ops, value) for value in (query, *new)),
        *past,
        *lengths,
        domain=_DOMAIN,
        num_heads=heads,
        kv_num_heads=_size(stored[0], 1),
        scale=node.attributes["scale"].as_float(),
    )
    for old, joined in zip(stored, present, strict=True):
        joined.type, joined.shape = old.type, old.shape
        old.name, joined.name = f"{joined.name}/replaced", old.name
        graph.outputs[graph.outputs.index(old)] = joined
    out = ops("Transpose", ops("Reshape", attended, [0, 0, heads, size]), perm=_SWAPPED)
    out.type, out.shape = node.outputs[0].type, node.outputs[0].shape
    ir.convenience.replace_all_uses_with(node.outputs[0], out)
    ops.insert(graph, node)
    graph.remove(node, safe=True)


def _joined(value: ir.Value) -> tuple[ir.Value, ir.Value]:
    """A layer's past and what is new, [batch, heads, tokens, size] each."""
    node = value.producer()
    assert node is not None
    past, new = node.inputs
    assert past is not None
    assert new is not None
    return past, new


def _flat(ops: Operators, value: ir.Value) -> ir.Value:
    """[batch, heads, seq, size] as [batch, seq, heads * size]."""
    return ops("Reshape", ops("Transpose", value, perm=_SWAPPED), [0, 0, -1])


def _size(value: ir.Value, axis: int) -> int:
    size = None if value.shape is None else value.shape[axis]
    assert isinstance(size, int)
    return size
