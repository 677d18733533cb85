"""A gate's answer with the sizes of what it gates, where TensorRT can see them."""

from __future__ import annotations

import onnx_ir as ir

from guardbake.passes.functions import DOMAIN as GUARD_DOMAIN


def size_gates(graph: ir.Graph) -> None:
    """Give every gate's answer visibly the first two sizes of the tensor that it gates."""
    for value, edits in _gates(graph).items():
        _size_gate(graph, value, edits)


def _gates(graph: ir.Graph) -> dict[ir.Value, list[tuple[ir.Node, int]]]:
    """Each gate's answer, [B, S] bool, with the guard functions that gate a [B, S, d] by it."""
    found: dict[ir.Value, list[tuple[ir.Node, int]]] = {}
    for node in graph:
        hidden = node.inputs[0] if node.inputs else None
        if node.domain != GUARD_DOMAIN or hidden is None or len(hidden.shape or ()) != 3:
            continue
        for index, value in enumerate(node.inputs):
            if not index or value is None:
                continue
            if value.dtype == ir.DataType.BOOL:
                found.setdefault(value, []).append((node, index))
    return found


def _size_gate(graph: ir.Graph, value: ir.Value, edits: list[tuple[ir.Node, int]]) -> None:
    """Reshape the gate's answer to the first two sizes of the tensor that it gates.

    They are the same sizes, but the gate has them from the attention mask, and TensorRT, which
    cannot prove that, would lose the sizes of every later hidden state: the next `Reshape` with a
    -1 then has an unknown number of heads and is refused.
    """
    first = edits[0][0]
    sizes = ir.node("Shape", [first.inputs[0]], attributes={"start": 0, "end": 2})
    shaped = ir.node("Reshape", [value, sizes.outputs[0]])
    for node, role in ((sizes, "sizes"), (shaped, "sized")):
        node.name = f"guardbake_tensorrt/{value.name}/{role}"
        node.outputs[0].name = f"{node.name}/output_0"
    shaped.outputs[0].dtype = ir.DataType.BOOL
    graph.insert_before(first, [sizes, shaped])
    for node, index in edits:
        node.replace_input_with(index, shaped.outputs[0])
