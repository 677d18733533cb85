"""A half-precision graph for onnxruntime's CPU provider, which computes in float32 throughout.

It has no arithmetic in bfloat16 at all, and of float16 it removes the Casts between two operators,
and with them the rounding. Here every operator is given the half-precision numbers, computes in
float32, and has its result rounded: what a GPU does that accumulates in float32. What stays
unchecked is the GPU's kernels, which no CPU has.
"""

from __future__ import annotations

from pathlib import Path

import onnx
import onnx_ir as ir
from onnx_ir.passes import common

HALVES, FLOAT = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16), ir.DataType.FLOAT


def emulate_half(path: Path) -> Path:
    """Write the emulated graph beside `path`; its cache is fed and given in float32."""
    model = ir.load(path)
    common.InlinePass()(model)
    inferred = onnx.shape_inference.infer_shapes(ir.to_proto(model), strict_mode=True)
    model = ir.from_proto(inferred)
    graph = model.graph
    for node in [node for node in graph if node.op_type != "Cast"]:
        for index, value in enumerate(node.inputs):
            if value is not None and value.dtype in HALVES:
                node.replace_input_with(index, _cast(graph, value, FLOAT, before=node))
        for value in node.outputs:
            if value.dtype in HALVES:
                _round(graph, node, value)
    for value in graph.inputs:
        if value.dtype in HALVES:
            value.dtype = FLOAT
    for index, value in enumerate(graph.outputs):
        if value.dtype in HALVES:
            name, value.name = value.name, f"{value.name}.half"
            graph.outputs[index] = _cast(graph, value, FLOAT)
            graph.outputs[index].name = name
    out = path.with_name(f"emulated.{path.name}")
    out.write_bytes(ir.to_proto(model).SerializeToString())
    return out


def _round(graph: ir.Graph, node: ir.Node, value: ir.Value) -> None:
    """Let the node write float32 and a Cast what it wrote before, under its name."""
    readers, name = list(value.uses()), value.name
    half, value.dtype = value.dtype, FLOAT
    value.name = f"{name}.float32"
    assert half is not None
    rounded = _cast(graph, value, half, after=node)
    rounded.name = name
    for use in readers:
        use.node.replace_input_with(use.idx, rounded)
    for index, output in enumerate(graph.outputs):
        if output is value:
            graph.outputs[index] = rounded


def _cast(
    graph: ir.Graph,
    value: ir.Value,
    dtype: ir.DataType,
    before: ir.Node | None = None,
    after: ir.Node | None = None,
) -> ir.Value:
    node = ir.node("Cast", [value], attributes={"to": dtype})
    node.outputs[0].dtype, node.outputs[0].shape = dtype, value.shape
    if before is not None:
        graph.insert_before(before, node)
    elif after is not None:
        graph.insert_after(after, node)
    else:
        graph.append(node)
    return node.outputs[0]
