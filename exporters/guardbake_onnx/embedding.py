"""The embedding graph: token ids and image features in, one sequence of embeddings out.

Written by hand, operator by operator, so that it also holds for no image at all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass
from transformers import PreTrainedModel

from guardbake.vlm.catalog import Family

from guardbake_onnx.parameters import mark_parameters, order_parameters
from guardbake_onnx.trace import OPSET
from guardbake_onnx.weights import IR_TYPES

_TABLE = "model.embed_tokens.weight"
_INT = ir.TensorType(ir.DataType.INT64)


def build_embedding(model: PreTrainedModel, family: Family) -> ir.Model:
    """input_ids [batch, seq] int64, image_features [features, d] -> inputs_embeds [batch, seq, d].

    The n-th image token of the batch, row by row, gets image_features[n]. Image tokens beyond the
    features keep their own embedding: an answer may contain one. The table is a parameter (see
    `parameters`) and may have no data.
    """
    module: Any = model.get_submodule(family.embedding)
    image_token_id = int(getattr(model.config, family.image_token))
    table = ir.LazyTensor(
        _no_data,
        dtype=IR_TYPES[model.dtype],
        shape=ir.Shape(list(module.weight.shape)),
        name=_TABLE,
    )
    scale = getattr(module, "scalar_embed_scale", None)  # Gemma's, of the words alone
    built = embedding_graph(table, image_token_id, scale)
    mark_parameters(built.graph, {_TABLE})
    order_parameters(built.graph, {"model": family.embedding.rpartition(".")[0]})
    return built


def _no_data() -> ir.TensorProtocol:
    raise AssertionError("the graph is built from the table's shape alone")


def embedding_graph(
    table: ir.TensorProtocol, image_token_id: int, scale: float | None = None
) -> ir.Model:
    """The graph for an embedding table [V, d]; scale: what words' embeddings are multiplied by."""
    rows_of_table, width = table.shape.numpy()
    kind = ir.TensorType(table.dtype)
    ids = ir.Value(name="input_ids", shape=ir.Shape(["batch", "seq"]), type=_INT)
    features = ir.Value(name="image_features", shape=ir.Shape(["features", width]), type=kind)
    tape = ir.tape.Tape()

    def op(name: str, inputs: list[ir.Value], **attributes: int) -> ir.Value:
        index = sum(node.op_type == name for node in tape.nodes)
        value = tape.op(name, inputs, attributes)
        node = tape.nodes[-1]
        node.name = f"/embedding/{name}" + (f"_{index}" if index else "")
        value.name = f"{node.name}/output_0"
        return value

    def constant(name: str, content: Any) -> ir.Value:
        return tape.initializer(ir.tensor(content, name=name), name=name)

    zero, last = np.array(0, np.int64), constant("last_axis", np.array([-1], np.int64))
    weight = tape.initializer(table, name=_TABLE)
    image_token = constant("image_token", np.array(image_token_id, np.int64))
    is_image = op("Equal", [ids, image_token])
    lookup = ids
    if image_token_id >= rows_of_table:  # nothing to look up, and always replaced below
        lookup = op("Where", [is_image, constant("any_token", zero), ids])
    words = op("Gather", [weight, lookup], axis=0)
    if scale is not None:
        factor = np.array(scale, table.dtype.numpy())
        words = op("Mul", [words, constant("embed_scale", factor)])
    # a row of zeros in front keeps the lookup legal without images; image tokens count from 1
    nothing = constant("no_feature", np.zeros((1, width), table.dtype.numpy()))
    rows = op("Concat", [nothing, features], axis=0)
    flat = op("Reshape", [is_image, last])
    count = op("CumSum", [_as_int(op, flat), constant("token_axis", zero)])
    covered = op("LessOrEqual", [count, op("Shape", [features], start=0, end=1)])
    replaced = op("And", [flat, covered])
    shape = op("Shape", [ids])
    place = op("Reshape", [op("Mul", [count, _as_int(op, replaced)]), shape])
    pictures = op("Gather", [rows, place], axis=0)
    choice = op("Unsqueeze", [op("Reshape", [replaced, shape]), last])
    out = op("Where", [choice, pictures, words])
    out.name, out.type = "inputs_embeds", kind
    out.shape = ir.Shape(["batch", "seq", width])
    graph = ir.Graph(
        [ids, features],
        [out],
        nodes=tape.nodes,
        initializers=tape.initializers,
        opset_imports={"": OPSET},
        name="main_graph",
    )
    return ir.Model(graph, ir_version=10, producer_name="guardbake")


def look_up_alone(model: ir.Model) -> None:
    """Cut the graph of `embedding_graph` down to input_ids -> inputs_embeds, for a caller that puts
    the image features in their place itself."""
    graph = model.graph
    whole = graph.outputs[0]
    words = next(node for node in graph if node.name == "/embedding/Gather").outputs[0]
    words.type, words.shape = whole.type, whole.shape
    graph.outputs[0] = words
    RemoveUnusedNodesPass()(model)
    words.name = "inputs_embeds"
    graph.inputs.pop()  # the features


def _as_int(op: Callable[..., ir.Value], flags: ir.Value) -> ir.Value:
    return op("Cast", [flags], to=int(ir.DataType.INT64))
