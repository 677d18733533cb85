"""Let a graph take its matrices as a checkpoint stores them, [out, in], and in the stored type."""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from guardbake_onnx.parameters import Parameter, mark, parameters_of


def cast_parameters(graph: ir.Graph, stored: Mapping[ir.Value, ir.DataType]) -> None:
    """Put a Cast behind every parameter that is stored in another type than the graph computes in.

    A runtime folds it when it loads the graph.
    """
    for value, kind in stored.items():
        wanted = value.dtype
        if wanted is None or wanted == kind:
            continue
        uses = list(value.uses())
        node = ir.node("Cast", [value], {"to": wanted}, name=f"/parameters/{value.name}/Cast")
        out = node.outputs[0]
        out.name, out.shape, out.type = f"{node.name}/output_0", value.shape, value.type
        value.type = ir.TensorType(kind)
        graph.insert_before(graph[0], node)
        for use in uses:
            use.node.replace_input_with(use.idx, out)


def take_untransposed(graph: ir.Graph) -> None:
    """Turn x @ W for every transposed parameter W into Gemm with the stored matrix, transB = 1.

    Gemm wants two axes: x [..., in] is folded to [n, in] before and unfolded after. Leading axes
    are folded once for all products of one x. Names of the products' outputs stay.
    """
    folded: dict[ir.Value, tuple[ir.Value, ir.Value]] = {}
    for value, parameter in parameters_of(graph):
        if not parameter.transposed:
            continue
        assert value.shape is not None
        width, height = value.shape.numpy()
        value.name = re.sub(r"\.MatMul\.weight$", ".weight", str(value.name))
        value.shape = ir.Shape([height, width])
        mark(value, Parameter(parameter.name, transposed=False))
        for use in list(value.uses()):
            node = use.node
            x = node.inputs[0]
            assert node.op_type == "MatMul"
            assert use.idx == 1
            assert x is not None
            if x not in folded:
                folded[x] = _fold(graph, node, x, width)
            _unfold(graph, node, folded[x], value, height)


def _fold(graph: ir.Graph, before: ir.Node, x: ir.Value, width: int) -> tuple[ir.Value, ir.Value]:
    """x as [n, width], and its leading axes."""
    name = _gemm_name(before)
    wanted = _constant(graph, "fold", [-1, width])
    flat = ir.node("Reshape", [x, wanted], name=f"{name}/fold")
    axes = ir.node("Shape", [x], {"start": 0, "end": -1}, name=f"{name}/axes")
    _describe(flat, x.type, ["n", width])
    rank = None if x.shape is None else len(x.shape) - 1
    _describe(axes, ir.TensorType(ir.DataType.INT64), None if rank is None else [rank])
    graph.insert_before(before, [flat, axes])
    return flat.outputs[0], axes.outputs[0]


def _unfold(
    graph: ir.Graph,
    product: ir.Node,
    folded: tuple[ir.Value, ir.Value],
    weight: ir.Value,
    height: int,
) -> None:
    """Put Gemm and a Reshape in the product's place."""
    called, old = _gemm_name(product), product.outputs[0]
    gemm = ir.node("Gemm", [folded[0], weight], {"transB": 1}, name=called)
    _describe(gemm, old.type, ["n", height])
    axes = [folded[1], _constant(graph, "unfold", [height])]
    shape = ir.node("Concat", axes, {"axis": 0}, name=f"{called}/shape")
    rank = None if old.shape is None else len(old.shape)
    _describe(shape, ir.TensorType(ir.DataType.INT64), None if rank is None else [rank])
    back = ir.node("Reshape", [gemm.outputs[0], shape.outputs[0]], name=f"{called}/unfold")
    new, name = back.outputs[0], old.name
    new.shape, new.type = old.shape, old.type
    graph.insert_before(product, [gemm, shape, back])
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
    graph.remove(product, safe=True)
    new.name = name


def _gemm_name(product: ir.Node) -> str:
    path, _, operator = str(product.name).rpartition("/")
    return f"{path}/{operator.replace('MatMul', 'Gemm')}"


def _describe(node: ir.Node, kind: ir.TypeProtocol | None, shape: list[str | int] | None) -> None:
    out = node.outputs[0]
    out.name, out.type = f"{node.name}/output_0", kind
    out.shape = None if shape is None else ir.Shape(shape)


def _constant(graph: ir.Graph, role: str, numbers: list[int]) -> ir.Value:
    """The initializer of these numbers, made once."""
    name = f"{role}_to_{numbers[-1]}"
    if name not in graph.initializers:
        tensor = ir.tensor(np.array(numbers, np.int64), name=name)
        value = ir.Value(
            name=name,
            shape=ir.Shape([len(numbers)]),
            type=ir.TensorType(ir.DataType.INT64),
            const_value=tensor,
        )
        graph.register_initializer(value)
    return graph.initializers[name]
