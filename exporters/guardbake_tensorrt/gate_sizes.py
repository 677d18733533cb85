"""A gate's answer with the sizes of what it gates, where TensorRT can see them."""

from __future__ import annotations

import onnx_ir as ir

from guardbake.passes.functions import DOMAIN as GUARD_DOMAIN
from guardbake.passes.probe import is_edit

_OPEN = 1  # of an edit's inputs, where it has a gate


def size_gates(graph: ir.Graph) -> None:
    """Give every gate's answer visibly the first two sizes of the tensor that it gates."""
    for value, edits in _gates(graph).items():
        _size_gate(graph, value, edits)


def _gates(graph: ir.Graph) -> dict[ir.Value, list[ir.Node]]:
    """Each gate's answer, [B, S] bool, with the edits of a [B, S, d] that it gates."""
    found: dict[ir.Value, list[ir.Node]] = {}
    for node in graph:
        open_ = node.inputs[_OPEN] if len(node.inputs) > _OPEN else None
        if node.domain != GUARD_DOMAIN or not is_edit(node) or open_ is None:
            continue
        if open_.dtype == ir.DataType.BOOL:  # the profile always has no gate
            found.setdefault(open_, []).append(node)
    return found


def _size_gate(graph: ir.Graph, value: ir.Value, edits: list[ir.Node]) -> None:
    """Reshape the gate's answer to the first two sizes of the tensor that it gates.

    They are the same sizes, but the gate has them from the attention mask, and TensorRT, which
    cannot prove that, would lose the sizes of every later hidden state: the next `Reshape` with a
    -1 then has an unknown number of heads and is refused.
    """
    first = edits[0]
    sizes = ir.node("Shape", [first.inputs[0]], attributes={"start": 0, "end": 2})
    shaped = ir.node("Reshape", [value, sizes.outputs[0]])
    for node, role in ((sizes, "sizes"), (shaped, "sized")):
        node.name = f"guardbake_tensorrt/{value.name}/{role}"
        node.outputs[0].name = f"{node.name}/output_0"
    shaped.outputs[0].dtype = ir.DataType.BOOL
    graph.insert_before(first, [sizes, shaped])
    for edit in edits:
        edit.replace_input_with(_OPEN, shaped.outputs[0])
