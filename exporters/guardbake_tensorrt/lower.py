"""The graph as TensorRT wants it: a copy in memory that points at the same weights.

Two choices are the caller's. The cache grows by Concat, as in the exported graph, or is static (see
`static_cache`). The trunk computes in float32, as exported, or in half precision around the guard,
which stays in float32 (see `precision`).
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from guardbake.bundle.graphs import load_graph
from guardbake.errors import IntegrityError, MalformedError, ResourceFault, UsageError

from guardbake_tensorrt.gate_sizes import size_gates
from guardbake_tensorrt.native import DECOMPOSABLE
from guardbake_tensorrt.precision import CastTensor, cast_trunk
from guardbake_tensorrt.static_cache import use_static_cache

Cache = Literal["growing", "static"]
Trunk = Literal["float32", "float16", "bfloat16"]
_HALF: Final[dict[Trunk, ir.DataType]] = {
    "float16": ir.DataType.FLOAT16,
    "bfloat16": ir.DataType.BFLOAT16,
}
_EXTERNAL_FROM: Final = 1024  # bytes; smaller arrays stay in the graph, as in an exported one
# Every other dtype has a fused attention kernel of its own; marking it would only slow it down.
_FUSED = frozenset({ir.DataType.FLOAT16, ir.DataType.BFLOAT16})


@dataclass(frozen=True)
class LoweredGraph:
    """`serialized` is the changed graph without its external weights, which stay in `source`'s
    folder and are read from there by the parser: no second copy on disk or in the protobuf. Weights
    that were cast lie nowhere yet: see `cast_weights` and `write_lowered`.

    decomposable: the attention nodes marked to be run without a fused kernel. cache, capacity: what
    was asked for. trunk: the dtype that the cache has now, whether cast or exported so.
    """

    source: Path
    model: ir.Model
    serialized: bytes
    decomposable: tuple[str, ...]
    cache: Cache = "growing"
    capacity: int | None = None
    trunk: Trunk = "float32"

    @property
    def choices(self) -> tuple[tuple[str, str], ...]:
        """(name, value) of what was asked for: with the profile, what a runner has to know."""
        size = () if self.capacity is None else (("capacity", str(self.capacity)),)
        return ("cache", self.cache), *size, ("trunk", self.trunk)

    def cast_weights(self) -> dict[str, npt.NDArray[Any]]:
        """The large weights that are in another dtype than `source` has them, by name.

        Reads, casts and returns all of them, so this is where their memory goes. Raises
        UnsupportedError when one does not fit its dtype.
        """
        found = self.model.graph.initializers
        tensors = {name: found[name].const_value for name in sorted(found)}
        return {
            name: np.ascontiguousarray(tensor.numpy())
            for name, tensor in tensors.items()
            if isinstance(tensor, CastTensor)
        }


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
    model = load_graph(path)
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
    """The initialisers whose bytes lie in another file, in the order of their names; of those that
    were cast, what they were cast from."""
    for name in sorted(model.graph.initializers):
        tensor = model.graph.initializers[name].const_value
        if isinstance(tensor, CastTensor):
            tensor = tensor.source
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
    TensorRT. trunk: "float32" leaves every dtype as exported, the others need a float32 graph or
    one that is in it.
    Whatever is chosen, fp32 attention has no fused kernel, and the builder refuses it unless the
    node says `TRT_decomposable=1`, which lets it run as plain MatMuls and Softmax (a node of
    unknown dtype is marked as well: the mark permits, it does not force). And a gate's answer must
    visibly have the sizes of the tensor it gates. Model-local functions stay: the parser inlines
    them itself and keeps the caller's name in every layer.
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
    if trunk not in ("float32", _trunk_of(model)):
        cast_trunk(model, _HALF[trunk], path)
    marked = _mark_attention(model) if capacity is None else use_static_cache(model, capacity, path)
    size_gates(model.graph)
    return LoweredGraph(path, model, _serialize(model), marked, cache, capacity, _trunk_of(model))


def _trunk_of(model: ir.Model) -> Trunk:
    for value in model.graph.inputs:
        if str(value.name).startswith("past_key_values."):
            for name, dtype in _HALF.items():
                if value.dtype == dtype:
                    return name
    return "float32"


def write_lowered(lowered: LoweredGraph, path: Path) -> None:
    """Write the graph to `path` and its large weights to <path>.data beside it, both new.

    It is the graph that the parser is given, for other runtimes to be asked what the engine will
    compute; of a growing cache in float32 it has marks that only TensorRT knows. Raises UsageError
    if either file is there already, for no source is ever written, ResourceFault if the disk is
    full; nothing is left behind then.
    """
    data = path.with_name(f"{path.name}.data")
    for each in (path, data):
        if each.exists():
            raise UsageError(
                found="a file that is there already",
                expected="a new file for the lowered graph",
                where=str(each),
                remedy="choose another name, or remove it",
            )
    try:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
            partial = Path(folder) / path.name
            ir.save(
                lowered.model,
                partial,
                external_data=data.name,
                size_threshold_bytes=_EXTERNAL_FROM,
            )
            for each in sorted(Path(folder).iterdir(), reverse=True):  # the data first
                each.rename(path.with_name(each.name))
    except OSError as error:
        raise ResourceFault(
            found=f"a failed write ({error})",
            expected="room for the lowered graph and its weights",
            where=str(path),
            remedy="free some space and lower again",
        ) from error


def _serialize(model: ir.Model) -> bytes:
    """The protobuf; in the place of each cast weight a reference that is not to be followed."""
    cast = [
        (value, value.const_value)
        for value in model.graph.initializers.values()
        if isinstance(value.const_value, CastTensor)
    ]
    for value, tensor in cast:
        value.const_value = ir.ExternalTensor(
            "cast.data", 0, tensor.nbytes, tensor.dtype, shape=tensor.shape, name=str(value.name)
        )
    try:
        return bytes(ir.to_proto(model).SerializeToString())
    finally:
        for value, tensor in cast:
            value.const_value = tensor


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
