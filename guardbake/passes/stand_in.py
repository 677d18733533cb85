"""Stand-ins for operators that one runtime alone has, so that the rest of a graph can be run.

Requires: a decoder graph. Leaves: a graph for a check of the guard's numbers on tensors of the
right size and dtype, which attention of another kind computed: never for shipping.
"""

from __future__ import annotations

import onnx_ir as ir

from guardbake.errors import UnsupportedError


class StandIn:
    """The pass. `StandIn(domain)(model)` says which operators of the domain it replaced."""

    def __init__(self, domain: str) -> None:
        self.domain = domain

    def __repr__(self) -> str:
        return f"StandIn({self.domain})"

    def __call__(self, model: ir.Model) -> tuple[str, ...]:
        nodes = [node for node in model.graph if node.domain == self.domain]
        for node in nodes:
            if node.op_type != "AttentionPlugin":
                raise UnsupportedError(
                    found=f"{self.domain}::{node.op_type} {node.name}",
                    expected="operators that onnxruntime has, or the attention plugin",
                    where="the numeric self-check",
                    remedy="say --no-self-check, and check the engine where it runs",
                )
            _replace_attention(model.graph, node)
        return tuple(sorted({node.op_type for node in nodes}))


def _replace_attention(graph: ir.Graph, node: ir.Node) -> None:
    """(qkv [T, (H + 2 K) D], past, ...) -> (the queries as heads [T, H, D], past as it came)."""
    qkv, past = node.inputs[0], node.inputs[1]
    heads, size = (node.attributes[name].as_int() for name in ("num_q_heads", "head_size"))
    attended, present = node.outputs[0], node.outputs[1]
    made: list[ir.Node] = []

    def op(kind: str, inputs: list[ir.Value | None]) -> ir.Value:
        made.append(ir.node(kind, inputs, name=f"{node.name}/stand_in/{kind}_{len(made)}"))
        made[-1].outputs[0].name = f"{made[-1].name}/output"
        return made[-1].outputs[0]

    def ints(*values: int) -> ir.Value:
        made.append(ir.node("Constant", [], attributes={"value_ints": list(values)}))
        made[-1].name = f"{node.name}/stand_in/Constant_{len(made)}"
        made[-1].outputs[0].name = f"{made[-1].name}/output"
        return made[-1].outputs[0]

    queries = op("Slice", [qkv, ints(0), ints(heads * size), ints(-1)])
    new = [op("Reshape", [queries, ints(0, heads, size)]), op("Identity", [past])]
    graph.insert_before(node, made)
    for old, value in zip((attended, present), new, strict=True):
        name, value.type, value.shape = old.name, old.type, old.shape
        ir.convenience.replace_all_uses_with(old, value, replace_graph_outputs=True)
        old.name, value.name = f"{name}/replaced", name
    graph.remove(node, safe=True)
