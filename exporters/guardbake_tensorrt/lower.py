"""The graph as TensorRT wants it: a copy in memory that points at the same weights.

Two choices are the caller's. The cache grows by Concat, as in the exported graph, or is static (see
`static_cache`). The trunk computes in float32, as exported, or in half precision around the guard,
which stays in float32 (see `precision`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import onnx_ir as ir
from google.protobuf.message import DecodeError

from guardbake.errors import IntegrityError, MalformedError, UsageError
from guardbake.passes.functions import DOMAIN as GUARD_DOMAIN

from guardbake_tensorrt.native import DECOMPOSABLE
from guardbake_tensorrt.static_cache import use_static_cache

Cache = Literal["growing", "static"]
Trunk = Literal["float32", "float16", "bfloat16"]
# Every other dtype has a fused attention kernel of its own; marking it would only slow it down.
_FUSED = frozenset({ir.DataType.FLOAT16, ir.DataType.BFLOAT16})


@dataclass(frozen=True)
class LoweredGraph:
    """`serialized` is the changed graph without its external weights, which stay in `source`'s
    folder and are read from there by the parser: no second copy on disk or in the protobuf."""

    source: Path
    model: ir.Model
    serialized: bytes
    decomposable: tuple[str, ...]


def read_graph(path: Path) -> ir.Model:
    """The ONNX file as an onnx-ir model; external weights are not read.

    Raises UsageError when there is no such file, MalformedError when it is no ONNX model,
    IntegrityError when a weight's external data is missing or too short.
    """
    if not path.is_file():
        raise UsageError(
            found="no such file",
            expected="an ONNX file",
            where=str(path),
            remedy="correct the path",
        )
    try:
        model = ir.load(path)
    except (DecodeError, ValueError) as error:
        raise MalformedError(
            found=f"bytes that do not decode ({error})",
            expected="an ONNX model",
            where=str(path),
            remedy="export the file again",
        ) from error
    if not model.ir_version or not model.graph.outputs:
        raise MalformedError(
            found="a model without version or outputs",
            expected="an ONNX model",
            where=str(path),
            remedy="export the file again",
        )
    for tensor in external_tensors(model):
        _require_data(tensor, path)
    return model


def external_tensors(model: ir.Model) -> Iterator[ir.ExternalTensor]:
    """The initialisers whose bytes lie in another file, in the order of their names."""
    for name in sorted(model.graph.initializers):
        tensor = model.graph.initializers[name].const_value
        if isinstance(tensor, ir.ExternalTensor):
            yield tensor


def _require_data(tensor: ir.ExternalTensor, path: Path) -> None:
    data = Path(tensor.path)
    end = (tensor.offset or 0) + (tensor.length if tensor.length is not None else tensor.nbytes)
    size = data.stat().st_size if data.is_file() else -1
    if size < end:
        raise IntegrityError(
            found=f"{data.name} with {size} bytes" if size >= 0 else f"no file {data.name}",
            expected=f"at least {end} bytes, for the weight {tensor.name!r}",
            where=str(path),
            remedy="copy the external data again next to the graph",
        )


def every_node(model: ir.Model) -> Iterator[ir.Node]:
    """All nodes: the graph's, its subgraphs', and those in the bodies of model-local functions."""
    yield from ir.traversal.RecursiveGraphIterator(model.graph)
    for key in sorted(model.functions):
        yield from ir.traversal.RecursiveGraphIterator(model.functions[key])


def lower_graph(
    path: Path,
    model: ir.Model,
    *,
    cache: Cache = "growing",
    capacity: int | None = None,
    trunk: Trunk = "float32",
) -> LoweredGraph:
    """Rewrite `model`, which was read from `path`, in place; the file itself is never written.

    cache: "static" takes `capacity`, in tokens; its file runs in onnxruntime as well as in
    TensorRT. Whatever the cache, fp32 attention has no fused kernel, and the builder refuses it
    unless the node says `TRT_decomposable=1`, which lets it run as plain MatMuls and Softmax (a
    node of unknown dtype is marked as well: the mark permits, it does not force). And a gate's
    answer must visibly have the sizes of the tensor it gates. Model-local functions stay: the
    parser inlines them itself and keeps the caller's name in every layer.
    Raises UsageError for choices that do not go together, UnsupportedError for a graph that they
    cannot be made of.
    """
    if (capacity is None) != (cache == "growing") or (capacity is not None and capacity < 1):
        raise UsageError(
            found=f"a {cache} cache with capacity {capacity}",
            expected="a static cache with a capacity of 1 token or more, or a growing one without",
            where="the choice of cache",
            remedy="give the capacity of a static cache, and only then",
        )
    marked = _mark_attention(model) if capacity is None else use_static_cache(model, capacity, path)
    for value, edits in _gates(model.graph).items():
        _size_gate(model.graph, value, edits)
    return LoweredGraph(path, model, ir.to_proto(model).SerializeToString(), marked)


def _mark_attention(model: ir.Model) -> tuple[str, ...]:
    marked = []
    for node in every_node(model):
        if node.op_type != "Attention" or node.domain not in ("", "ai.onnx"):
            continue
        query = node.inputs[0]
        if query is None or query.dtype not in _FUSED:
            node.attributes[DECOMPOSABLE] = ir.AttrInt64(DECOMPOSABLE, 1)
            marked.append(node.name or "")
    return tuple(marked)


def _gates(graph: ir.Graph) -> dict[ir.Value, list[tuple[ir.Node, int]]]:
    """Each gate's answer, [B, S] bool, with the guard functions that gate a [B, S, d] by it."""
    found: dict[ir.Value, list[tuple[ir.Node, int]]] = {}
    for node in graph:
        hidden = node.inputs[0] if node.inputs else None
        if node.domain != GUARD_DOMAIN or hidden is None or len(hidden.shape or ()) != 3:
            continue
        for index, value in enumerate(node.inputs):
            if not index or value is None:
                continue
            if value.dtype == ir.DataType.BOOL:
                found.setdefault(value, []).append((node, index))
    return found


def _size_gate(graph: ir.Graph, value: ir.Value, edits: list[tuple[ir.Node, int]]) -> None:
    """Reshape the gate's answer to the first two sizes of the tensor that it gates.

    They are the same sizes, but the gate has them from the attention mask, and TensorRT, which
    cannot prove that, would lose the sizes of every later hidden state: the next `Reshape` with a
    -1 then has an unknown number of heads and is refused.
    """
    first = edits[0][0]
    sizes = ir.node("Shape", [first.inputs[0]], attributes={"start": 0, "end": 2})
    shaped = ir.node("Reshape", [value, sizes.outputs[0]])
    for node, role in ((sizes, "sizes"), (shaped, "sized")):
        node.name = f"guardbake_tensorrt/{value.name}/{role}"
        node.outputs[0].name = f"{node.name}/output_0"
    shaped.outputs[0].dtype = ir.DataType.BOOL
    graph.insert_before(first, [sizes, shaped])
    for node, index in edits:
        node.replace_input_with(index, shaped.outputs[0])
