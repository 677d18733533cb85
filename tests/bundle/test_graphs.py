"""A graph file states how many values a tensor has; readers make room for what it has."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from guardbake.bundle.graphs import load_graph
from guardbake.errors import MalformedError

KINDS = sorted(set(ir.DataType) - {ir.DataType.UNDEFINED, ir.DataType.STRING})


def write(tensor: onnx.TensorProto, path: Path, place: str) -> Path:
    """A graph with one tensor: an initialiser, a constant in the body of a function, or a default
    of one of its attributes."""
    held = {"value": tensor} if place == "function" else {"value_float": 1.0}
    constant = onnx.helper.make_node("Constant", [], ["c"], **held)
    opsets = [onnx.helper.make_opsetid("", 23), onnx.helper.make_opsetid("own", 1)]
    body = onnx.helper.make_function("own", "Body", [], ["c"], [constant], opsets[:1])
    if place == "default":
        body.attribute_proto.append(onnx.helper.make_attribute("a", tensor))
    call = onnx.helper.make_node("Body", [], ["y"], domain="own")
    inside = [tensor] if place == "initialiser" else []
    graph = onnx.helper.make_graph([call], "graph", [], [], inside)
    functions = [] if place == "initialiser" else [body]
    model = onnx.helper.make_model(graph, opset_imports=opsets, functions=functions, ir_version=10)
    path.write_bytes(model.SerializeToString())
    return path


@pytest.mark.parametrize("place", ["initialiser", "function", "default"])
@pytest.mark.parametrize("data", ["bytes", "list", "nothing"])
@pytest.mark.parametrize("kind", ["FLOAT", "INT4", "UINT2", "UNDEFINED"])
def test_a_tensor_of_more_values_than_it_has(
    tmp_path: Path, kind: str, data: str, place: str
) -> None:
    """Unpacking 4 bits made room for the shape, twenty gigabytes for this one: fuzzing found it."""
    tensor = onnx.TensorProto(name="w", data_type=ir.DataType[kind], dims=[1, 2**32])
    if data == "bytes":
        tensor.raw_data = bytes(4)
    elif data == "list":
        (tensor.float_data if kind == "FLOAT" else tensor.int32_data).append(1)
    with pytest.raises(MalformedError, match=r"'w' of shape \[1,4294967296\] with \d+ values"):
        load_graph(write(tensor, tmp_path / "g.onnx", place))


def test_sizes_below_zero(tmp_path: Path) -> None:
    """numpy takes -1 for "what is left"."""
    tensor = onnx.TensorProto(name="w", data_type=1, dims=[-1, 2], raw_data=bytes(16))
    with pytest.raises(MalformedError, match="sizes of 0 or more"):
        load_graph(write(tensor, tmp_path / "g.onnx", "initialiser"))


@pytest.mark.parametrize("outside", [True, False])
def test_more_dimensions_than_any_reader_takes(tmp_path: Path, outside: bool) -> None:
    """The size of this one has two million digits, which take more than a minute to multiply."""
    tensor = onnx.TensorProto(name="w", data_type=1, dims=[127] * 1_000_000)
    if outside:
        tensor.data_location = onnx.TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value="data")
    with pytest.raises(MalformedError, match="'w' of 1000000 dimensions"):
        load_graph(write(tensor, tmp_path / "g.onnx", "initialiser"))


def test_what_is_said_is_the_cause(tmp_path: Path) -> None:
    tensor = onnx.TensorProto(name="w", data_type=99, dims=[2], raw_data=bytes(8))
    with pytest.raises(MalformedError, match="99 is not a valid DataType"):
        load_graph(write(tensor, tmp_path / "g.onnx", "initialiser"))


def test_a_text_is_no_graph(tmp_path: Path) -> None:
    """By its name alone it would be read as JSON."""
    (tmp_path / "g.json").write_text("{}")
    with pytest.raises(MalformedError, match="an ONNX graph"):
        load_graph(tmp_path / "g.json")


@pytest.mark.parametrize("raw", [True, False])
@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 5)])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_what_onnx_writes_is_read(
    tmp_path: Path, kind: ir.DataType, shape: tuple[int, ...], raw: bool
) -> None:
    values = np.ones(shape, kind.numpy())
    if raw:
        tensor = ir.to_proto(ir.Tensor(values, kind, name="w"))
    else:
        tensor = onnx.helper.make_tensor("w", int(kind), shape, values.reshape(-1).tolist())
    model = load_graph(write(tensor, tmp_path / "g.onnx", "initialiser"))
    read = model.graph.initializers["w"].const_value
    assert read is not None
    np.testing.assert_array_equal(read.numpy(), values)


def test_a_function_in_the_place_of_a_known_operator(tmp_path: Path) -> None:
    """Whoever reads the graph takes it for the operator; no exporter writes one."""
    tensor = onnx.TensorProto(name="w", data_type=1, float_data=[1.0])
    path = write(tensor, tmp_path / "g.onnx", "function")
    model = onnx.load(path)
    model.functions[0].domain, model.functions[0].name = "", "Shape"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(MalformedError, match="a function in ONNX's own domain, Shape"):
        load_graph(path)
