"""TensorRT's own attention and cache layers as model-local functions.

The parser knows `TRT_Attention` and `TRT_KVCacheUpdate` by name and takes the layer; every other
runtime inlines the body, which is written in operators of the ONNX standard and computes the same.
One file therefore serves both, and what is checked in onnxruntime is what the engine is built from.
Source: "TensorRT Custom Operator Schemas" in the documentation of the ONNX parser.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import onnx_ir as ir

NATIVE_DOMAIN: Final = "trt.plugins"
ATTENTION: Final = "TRT_Attention"
CACHE_UPDATE: Final = "TRT_KVCacheUpdate"
DECOMPOSABLE: Final = "TRT_decomposable"


def attention_function(opset: int) -> ir.Function:
    """(Q [B,H,S,D], K [B,K,C,D], V [B,K,C,D], attn_mask [B,1,S,C] bool) -> Y [B,H,S,D].

    softmax(Q K^T) V over the keys where attn_mask is true, in the dtype of Q. It scales nothing:
    the caller scales Q. With the attribute TRT_decomposable = 1 TensorRT may do without a fused
    kernel, of which float32 has none.
    """
    inputs = [ir.Value(name=name) for name in ("Q", "K", "V", "attn_mask")]
    attended = ir.node("Attention", inputs, attributes={"scale": 1.0}, name="Attention_0")
    marks = [ir.AttrInt64(DECOMPOSABLE, 0)]
    return _function(ATTENTION, inputs, [attended], marks, opset)


def cache_update_function(opset: int) -> ir.Function:
    """(past_cache [B,K,C,D], update [B,K,S,D], write_indices [B] int32) -> Y [B,K,C,D].

    Y[b, :, write_indices[b] + s] = update[b, :, s], all else as in past_cache; no index may pass
    the end. TensorRT writes in place: past_cache is a network input, Y a network output, and both
    are bound to one address.
    """
    past, update, first = (
        ir.Value(name=name) for name in ("past_cache", "update", "write_indices")
    )
    nodes: list[ir.Node] = []

    def op(op_type: str, values: Sequence[ir.Value], **attributes: ir.Attr) -> ir.Value:
        node = ir.Node("", op_type, values, attributes=list(attributes.values()))
        node.name = f"{op_type}_{len(nodes)}"
        node.outputs[0].name = f"{node.name}_0"
        nodes.append(node)
        return node.outputs[0]

    def ints(value: int | list[int]) -> ir.Value:
        tensor = ir.tensor(value, dtype=ir.DataType.INT64)
        return op("Constant", [], value=ir.AttrTensor("value", tensor))

    sizes = op("Shape", [update])
    tokens = op("Gather", [sizes, ints(2)])
    start = op("Cast", [first], to=ir.AttrInt64("to", ir.DataType.INT64))
    places = op("Range", [ints(0), tokens, ints(1)])
    places = op("Add", [op("Unsqueeze", [start, ints([1])]), places])
    places = op("Expand", [op("Unsqueeze", [places, ints([1, 3])]), sizes])
    op("ScatterElements", [past, places, update], axis=ir.AttrInt64("axis", 2))
    return _function(CACHE_UPDATE, [past, update, first], nodes, [], opset)


def _function(
    name: str,
    inputs: Sequence[ir.Value],
    nodes: Sequence[ir.Node],
    attributes: Sequence[ir.Attr],
    opset: int,
) -> ir.Function:
    output = nodes[-1].outputs[0]
    output.name = "Y"
    graph = ir.Graph(inputs, [output], nodes=nodes, opset_imports={"": opset}, name=name)
    return ir.Function(NATIVE_DOMAIN, name, graph=graph, attributes=attributes)
