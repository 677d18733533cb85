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
MAX_RANK = 64  # numpy's; the size of a tensor is the product of so many numbers at most
_STANDARD = (
    "",
    "ai.onnx",
)  # of others' domains mobius gives functions, which onnxruntime passes over
_SHOWN = 120  # characters of a name, a shape or an error
_REMEDY = "export the model again"


def load_graph(path: Path) -> ir.Model:
    """The graph, its external data left on disk.

    Raises MalformedError if it is not ONNX, if a tensor states more dimensions than MAX_RANK, or
    more values than the file has of it, or if a function stands in for an operator of ONNX.
    """
    try:
        model = ir.load(path, format="protobuf")
        for tensor in tensors_of(model):
            if isinstance(tensor, ir.TensorProtoTensor | ir.ExternalTensor):
                _check_values(tensor, path)
        _check_functions(model, path)
    except (DecodeError, *ALTERED) as error:
        raise _malformed(_said(error), "an ONNX graph", path) from error
    return model


def _said(error: BaseException) -> str:
    """What onnx-ir stumbled at: it wraps the error once for every level of the graph."""
    while isinstance(error, SerdeError) and error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {error}"[:_SHOWN]


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
    attributes = [each for node in nodes for each in node.attributes.values()]
    for function in model.functions.values():
        attributes += function.attributes.values()  # the defaults
    for attribute in attributes:
        value = attribute.value
        yield from value if isinstance(value, list | tuple) else [value]


def _check_values(tensor: ir.TensorProtoTensor | ir.ExternalTensor, path: Path) -> None:
    """Readers make room by the stated shape: a file of a hundred bytes could ask for terabytes."""
    what, shape = f"tensor {str(tensor.name)[:_SHOWN]!r}", str(tensor.shape)[:_SHOWN]
    if len(tensor.shape) > MAX_RANK:
        found = f"{what} of {len(tensor.shape)} dimensions"
        raise _malformed(found, f"{MAX_RANK} at most", path)
    if isinstance(tensor, ir.ExternalTensor):
        return  # see `check_external_data`
    if any(int(dim) < 0 for dim in tensor.raw.dims):
        raise _malformed(f"{what} of shape {shape}", "sizes of 0 or more", path)
    held = _held(tensor)
    if tensor.size > held:
        found = f"{what} of shape {shape} with {held} values"
        raise _malformed(found, f"{tensor.size} values"[:_SHOWN], path)


def _check_functions(model: ir.Model, path: Path) -> None:
    for function in model.functions.values():
        if function.domain in _STANDARD:
            found = f"a function in ONNX's own domain, {function.name}"[:_SHOWN]
            raise _malformed(found, "functions in domains of their own", path)


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
    return MalformedError(found=found, expected=expected, where=str(path), remedy=_REMEDY)
