"""Read a graph file that anybody may have written: its structure, and the small numbers in it.

What lies outside the file is not read; see `bundle.data`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx_ir as ir
from google.protobuf.message import DecodeError
from onnx_ir.serde import SerdeError

from guardbake.errors import MalformedError

# How a graph that somebody altered makes its readers stumble: a node without an input, an attribute
# of another type, a scope that is no list, data that cannot be read.
ALTERED = (
    AssertionError, LookupError, OSError, SerdeError, SyntaxError, TypeError, ValueError,
)  # fmt: skip
_SHOWN = 120  # characters of a name in an error


def load_graph(path: Path) -> ir.Model:
    """The graph, its external data left on disk.

    Raises MalformedError if it is not ONNX, or if a tensor in the file states another number of
    values than it has.
    """
    try:
        model = ir.load(path)
        for tensor in tensors_of(model):
            if isinstance(tensor, ir.TensorProtoTensor):
                _check_values(tensor, path)
    except (DecodeError, *ALTERED) as error:
        raise _malformed(f"{type(error).__name__}: {error}", "an ONNX graph", path) from error
    return model


def tensors_of(model: ir.Model) -> Iterator[Any]:
    """Initialisers and attributes of the graph, its subgraphs and its functions; among attributes
    also those that hold no tensor."""
    graphs = [model.graph, *model.graph.subgraphs()]
    for function in model.functions.values():
        graphs += function.subgraphs()
    nodes = [node for graph in graphs for node in graph]
    nodes += [node for function in model.functions.values() for node in function]
    for graph in graphs:
        yield from (value.const_value for value in graph.initializers.values())
    for node in nodes:
        for attribute in node.attributes.values():
            value = attribute.value
            yield from value if isinstance(value, list | tuple) else [value]


def _check_values(tensor: ir.TensorProtoTensor, path: Path) -> None:
    """Readers make room by the stated shape: a file of a hundred bytes could ask for terabytes."""
    what, shape = f"tensor {str(tensor.name)[:_SHOWN]!r}", [int(dim) for dim in tensor.raw.dims]
    if any(dim < 0 for dim in shape):
        raise _malformed(f"{what} of shape {str(shape)[:_SHOWN]}", "sizes of 0 or more", path)
    held = _held(tensor)
    if tensor.size > held:
        found = f"{what} of shape {str(shape)[:_SHOWN]} with {held} values"
        raise _malformed(found, f"{tensor.size} values", path)


def _held(tensor: ir.TensorProtoTensor) -> int:
    """How many values the bytes or the list in the file can be, at most."""
    proto, dtype = tensor.raw, tensor.dtype
    if dtype == ir.DataType.UNDEFINED:
        return 0
    if proto.HasField("raw_data"):
        return int(len(proto.raw_data) * 8 // dtype.bitwidth)
    lists = (
        proto.int32_data, proto.int64_data, proto.uint64_data, proto.float_data, proto.double_data,
    )  # fmt: skip
    return max(map(len, lists)) * (8 // dtype.bitwidth if dtype.bitwidth in (2, 4) else 1)


def _malformed(found: str, expected: str, path: Path) -> MalformedError:
    return MalformedError(
        found=found, expected=expected, where=str(path), remedy="export the model again"
    )
