"""Embeddings that say what they stand for."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from guardbake.errors import SiteError
from guardbake.passes.mark import MarkEmbeddings


def graph_giving(output: str, dtype: ir.DataType, shape: list[int | str] | None) -> ir.Model:
    """A graph that hands its input on."""
    dims = None if shape is None else ir.Shape(shape)
    given = ir.Value(name="given", type=ir.TensorType(dtype), shape=dims)
    node = ir.node("Identity", [given])
    out = node.outputs[0]
    out.name, out.type, out.shape = output, given.type, dims
    graph = ir.Graph([given], [out], nodes=[node], opset_imports={"": 18}, name="graph")
    return ir.Model(graph, ir_version=10)


@pytest.mark.parametrize(
    ("output", "mark", "shape"),
    [("inputs_embeds", 0, ["batch", "seq", 4]), ("image_features", 1, ["features", 4])],
)
@pytest.mark.parametrize("dtype", [ir.DataType.FLOAT, ir.DataType.FLOAT16])
def test_one_more_column_tells(
    output: str, mark: int, shape: list[int | str], dtype: ir.DataType
) -> None:
    model = graph_giving(output, dtype, shape)
    MarkEmbeddings()(model)
    assert [str(value.shape[-1]) for value in model.graph.outputs if value.shape] == ["5"]
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString())
    given = np.random.default_rng(0).standard_normal((2, 3, 4)[-len(shape) :]).astype(dtype.numpy())
    (got,) = session.run([output], {"given": given})
    assert got.dtype == given.dtype
    assert (got[..., :-1] == given).all()
    assert (got[..., -1] == mark).all()


@pytest.mark.parametrize(
    "model",
    [
        graph_giving("hidden_states", ir.DataType.FLOAT, ["features", 4]),
        graph_giving("image_features", ir.DataType.FLOAT, None),
    ],
)
def test_what_cannot_be_marked_is_refused(model: ir.Model) -> None:
    before = ir.to_proto(model).SerializeToString()
    with pytest.raises(SiteError, match="a graph that makes embeddings"):
        MarkEmbeddings()(model)
    assert ir.to_proto(model).SerializeToString() == before
