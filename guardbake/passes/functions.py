"""The guard's model-local functions, sensor and gates: the law of `semantics` in ONNX operators.

Written from the law, never from the PyTorch reference. Every function computes in float32 whatever
the model's dtype. Arrays are inputs, so that they stand in the stored file as initialisers that a
reader can find.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from guardbake.semantics import CLOSED, OPEN, UNDECIDED

DOMAIN = "guardbake"
MIN_OPSET = 18  # from here on every reduction takes its axes as an input
INT64_MAX = np.iinfo(np.int64).max


class Body:
    """Collects the nodes of one function."""

    def __init__(self, inputs: Sequence[str]) -> None:
        self.inputs = {name: ir.Value(name=name) for name in inputs}
        self.nodes: list[ir.Node] = []

    def __call__(
        self,
        op_type: str,
        inputs: Sequence[ir.Value],
        attributes: dict[str, int | float | Sequence[int]] | None = None,
        outputs: int = 1,
    ) -> ir.Value:
        node = ir.node(op_type, inputs, attributes=attributes or {}, num_outputs=outputs)
        return self._append(node)

    def constant(self, value: float | int | Sequence[int], dtype: type[np.generic]) -> ir.Value:
        tensor = ir.tensor(np.array(value, dtype=dtype))
        return self._append(ir.node("Constant", [], attributes={"value": tensor}))

    def ints(self, *values: int) -> ir.Value:
        return self.constant(list(values), np.int64)

    def _append(self, node: ir.Node) -> ir.Value:
        node.name = f"{node.op_type}_{len(self.nodes)}"
        for index, output in enumerate(node.outputs):
            output.name = f"{node.name}_{index}"
        self.nodes.append(node)
        return node.outputs[0]

    def function(self, name: str, outputs: dict[str, ir.Value], opset: int) -> ir.Function:
        for new_name, value in outputs.items():
            value.name = new_name
        graph = ir.Graph(
            list(self.inputs.values()),
            list(outputs.values()),
            nodes=self.nodes,
            opset_imports={"": opset},
            name=name,
        )
        return ir.Function(DOMAIN, name, graph=graph, attributes=())


def sensor_function(name: str, opset: int) -> ir.Function:
    """(x [B,S,d], direction [d,1], centre [d], threshold []) -> score [B,S] float32."""
    op = Body(["x", "direction", "centre", "threshold"])
    x = op("Cast", [op.inputs["x"]], {"to": ir.DataType.FLOAT})
    along = op("MatMul", [op("Sub", [x, op.inputs["centre"]]), op.inputs["direction"]])
    flat = op("Squeeze", [along, op.ints(-1)])
    return op.function(name, {"score": op("Sub", [flat, op.inputs["threshold"]])}, opset)


def _real_tokens(op: Body) -> tuple[ir.Value, ir.Value, ir.Value]:
    """(rank [B,S] of each token of this call, real [B,S], total [B,1]) from the attention mask."""
    mask = op("Cast", [op.inputs["attention_mask"]], {"to": ir.DataType.INT64})
    tokens = op("Shape", [op.inputs["score"]], {"start": 1, "end": 2})
    start = op("Neg", [tokens])
    rank = op("CumSum", [mask, op.constant(1, np.int64)])
    window = [start, op.ints(INT64_MAX), op.ints(1)]
    ones = op("Slice", [mask, *window])
    total = op("ReduceSum", [mask, op.ints(1)], {"keepdims": 1})
    return op("Slice", [rank, *window]), op("Equal", [ones, op.ints(1)]), total


def _score_opens(op: Body) -> ir.Value:
    """[B,S] bool; a score that is not a number opens, as in the law."""
    zero = op.constant(0.0, np.float32)
    return op("Not", [op("LessOrEqual", [op.inputs["score"], zero])])


def token_gate_function(name: str, opset: int) -> ir.Function:
    """(score [B,S], attention_mask [B,P+S]) -> open [B,S] bool."""
    op = Body(["score", "attention_mask"])
    _, real, _ = _real_tokens(op)
    return op.function(name, {"open": op("And", [_score_opens(op), real])}, opset)


def sequence_gate_function(name: str, opset: int) -> ir.Function:
    """(score [B,S], attention_mask [B,P+S], state [B]) -> open [B,S] bool, state_out [B] int64."""
    op = Body(["score", "attention_mask", "state"])
    rank, real, total = _real_tokens(op)
    given = op("Unsqueeze", [op.inputs["state"], op.ints(1)])
    here = op("ReduceSum", [op("Cast", [real], {"to": ir.DataType.INT64}), op.ints(1)])
    past_end = op("GreaterOrEqual", [op("Sub", [total, here]), op("Neg", [given])])
    missed = op("And", [op("Less", [given, op.ints(UNDECIDED)]), past_end])
    state = op("Where", [missed, op.ints(OPEN), given])
    undecided = op("LessOrEqual", [state, op.ints(UNDECIDED)])
    ends_here = op("Equal", [state, op.ints(UNDECIDED)])
    end = op("Where", [ends_here, total, op("Neg", [state])])
    asked = op("And", [op("And", [real, op("Equal", [rank, end])]), undecided])
    verdict = op("Where", [_score_opens(op), op.ints(OPEN), op.ints(CLOSED)])
    news = op("Where", [asked, verdict, state])
    latest = op("ReduceMax", [news, op.ints(1)], {"keepdims": 1})
    state_out = op("Max", [state, latest])
    from_end = op("Or", [op("GreaterOrEqual", [rank, end]), op("Equal", [state, op.ints(OPEN)])])
    opened = op("Equal", [state_out, op.ints(OPEN)])
    open_ = op("And", [op("And", [real, from_end]), opened])
    flat = op("Squeeze", [state_out, op.ints(1)])
    return op.function(name, {"open": open_, "state_out": flat}, opset)
