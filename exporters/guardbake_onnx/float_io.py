"""Take and give float32 around a graph that computes in half precision."""

from __future__ import annotations

from collections.abc import Collection

import onnx_ir as ir


def in_float32(graph: ir.Graph, names: Collection[str]) -> None:
    """Let the inputs and outputs of these names be float32; a cast stands beside each that was not.

    Names that the graph does not have are passed over.
    """
    for value in [v for v in graph.inputs if v.name in names and v.dtype != ir.DataType.FLOAT]:
        outside = _float32(value)
        inside = _cast(outside, value)
        ir.convenience.replace_all_uses_with(value, inside.outputs[0])
        graph.inputs[graph.inputs.index(value)] = outside
        graph.insert_before(graph[0], inside)
    for value in [v for v in graph.outputs if v.name in names and v.dtype != ir.DataType.FLOAT]:
        outside = _float32(value)
        last = _cast(value, outside)
        value.name = f"{last.name}/input_0"
        last.outputs[0].name = outside.name
        graph.append(last)
        graph.outputs[graph.outputs.index(value)] = last.outputs[0]


def _float32(value: ir.Value) -> ir.Value:
    return ir.Value(name=value.name, type=ir.TensorType(ir.DataType.FLOAT), shape=value.shape)


def _cast(source: ir.Value, like: ir.Value) -> ir.Node:
    """A cast of `source` to what `like` is."""
    dtype = like.dtype or ir.DataType.UNDEFINED
    node = ir.node("Cast", [source], attributes={"to": int(dtype)}, name=f"/cast/{source.name}")
    out = node.outputs[0]
    out.name, out.type, out.shape = f"{node.name}/output_0", like.type, like.shape
    return node
