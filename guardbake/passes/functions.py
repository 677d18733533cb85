"""The guard's model-local functions, sensor and gates: the law of `semantics` in ONNX operators.

Written from the law, never from the PyTorch reference. Every function computes in float32 whatever
the model's dtype. Arrays are inputs, so that they stand in the stored file as initialisers that a
reader can find.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from guardbake.semantics import (
    CLOSED,
    IMAGES,
    LAST,
    OPEN,
    POOLED,
    SUM,
    TOKENS,
    UNDECIDED,
)
from guardbake.spec import GuardSpec, Reading, Sensor

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


def reading_inputs(reading: Reading) -> dict[str, np.ndarray]:
    """The arrays a reading's function takes after x, by input name, in order."""
    return {"directions": reading.directions, "centre": reading.centre}


def sensor_inputs(sensor: Sensor) -> dict[str, np.ndarray]:
    """The array a sensor's function takes after the features."""
    return {"thresholds": np.array(sensor.thresholds, np.float32)}


def reading_function(name: str, opset: int) -> ir.Function:
    """(x [B,S,d], directions [d,C], centre [d]) -> features [B,S,C] float32."""
    op = Body(["x", "directions", "centre"])
    x = op("Cast", [op.inputs["x"]], {"to": ir.DataType.FLOAT})
    features = op("MatMul", [op("Sub", [x, op.inputs["centre"]]), op.inputs["directions"]])
    return op.function(name, {"features": features}, opset)


def sensor_function(name: str, readings: int, opset: int) -> ir.Function:
    """(features [B,S,1] of each reading, thresholds [1]) -> score [B,S]."""
    op, f = _summed(readings, [])
    last = op("Squeeze", [f, op.ints(-1)])
    return op.function(name, {"score": op("Sub", [last, op.inputs["thresholds"]])}, opset)


def pooling_sensor_function(name: str, readings: int, opset: int) -> ir.Function:
    """(features [B,S,2] of each reading, thresholds [3], attention_mask [B,P+S], image_mask [B,S]
    bool, memory [B,3]) -> score [B,S], memory_out [B,3], forgotten [B,1] bool."""
    op, f = _summed(readings, ["attention_mask", "image_mask", "memory"])

    def column(source: ir.Value, index: int) -> ir.Value:
        """[B,S] or [B,1] of a value whose last axis has the columns."""
        return op("Gather", [source, op.constant(index, np.int64)], {"axis": -1})

    def carried(index: int) -> ir.Value:
        return op("Unsqueeze", [column(op.inputs["memory"], index), op.ints(1)])

    last = column(f, LAST)
    _, real, fed = _real_tokens(op, last)
    zero = op.constant(0.0, np.float32)
    image = op("And", [op.inputs["image_mask"], real])
    axis = op.constant(1, np.int64)
    amounts = op("Where", [image, column(f, POOLED), zero])
    total = op("Add", [carried(SUM), op("CumSum", [amounts, axis])])
    ones = op("Cast", [image], {"to": ir.DataType.FLOAT})
    images = op("Add", [carried(IMAGES), op("CumSum", [ones, axis])])
    mean = op("Div", [total, op("Max", [images, op.constant(1.0, np.float32)])])
    text, visual, pooled = (column(op.inputs["thresholds"], index) for index in range(3))
    seen = op("Sub", [op("Add", [last, mean]), pooled])
    seen = op("Max", [op("Sub", [last, visual]), seen])
    plain = op("Sub", [last, text])
    score = op("Where", [op("Greater", [images, zero]), seen, plain])
    here = op("ReduceSum", [op("Cast", [real], {"to": ir.DataType.FLOAT}), op.ints(1)])
    before = op("Sub", [op("Cast", [fed], {"to": ir.DataType.FLOAT}), here])
    forgotten = op("Not", [op("Equal", [before, carried(TOKENS)])])
    ends = [op.ints(-1), op.ints(INT64_MAX), op.ints(1)]
    parts = [op("Slice", [total, *ends]), op("Slice", [images, *ends])]
    after = op("Concat", [*parts, op("Add", [carried(TOKENS), here])], {"axis": 1})
    outputs = {"score": score, "memory_out": after, "forgotten": forgotten}
    return op.function(name, outputs, opset)


def _summed(readings: int, more: Sequence[str]) -> tuple[Body, ir.Value]:
    """A body with an input for each reading's features, and their sum."""
    names = [f"features_{index}" for index in range(readings)]
    op = Body([*names, "thresholds", *more])
    total = op.inputs[names[0]]
    for name in names[1:]:
        total = op("Add", [total, op.inputs[name]])
    return op, total


def _real_tokens(op: Body, like: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value]:
    """(rank [B,S] of each token of this call, real [B,S], total [B,1]) from the attention mask.

    like [B,S]: any value of the call's tokens.
    """
    mask = op("Cast", [op.inputs["attention_mask"]], {"to": ir.DataType.INT64})
    tokens = op("Shape", [like], {"start": 1, "end": 2})
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


def token_gate_function(name: str, packed: bool, opset: int) -> ir.Function:
    """(score [B,S], attention_mask [B,P+S]) -> open [B,S] bool.

    packed: there is no padding, and so no mask: (score) -> open, of whatever shape.
    """
    op = Body(["score"] if packed else ["score", "attention_mask"])
    opens = _score_opens(op)
    if not packed:
        _, real, _ = _real_tokens(op, op.inputs["score"])
        opens = op("And", [opens, real])
    return op.function(name, {"open": opens}, opset)


def gate_function(spec: GuardSpec, gate: int, packed: bool, opset: int) -> ir.Function:
    """The function of one of the spec's gates, under its name in the graph.

    packed: of a graph whose tokens are packed, which a gate of profile token alone can serve.
    """
    tag = f"{gate}_{spec.digest[:12]}"
    if spec.profile == "token":
        return token_gate_function(f"GuardbakeTokenGate_{tag}", packed, opset)
    name, gates = f"GuardbakeSequenceGate_{tag}", len(spec.sensors)
    return sequence_gate_function(name, gate, gates, spec.pools, opset)


def sequence_gate_function(
    name: str, gate: int, gates: int, remembers: bool, opset: int
) -> ir.Function:
    """(score [B,S], attention_mask [B,P+S], state [B]) -> open [B,S] bool, state_out [B] int64.

    gate: which one of how many gates. state is the call's; state_out holds the verdicts of gates 0
    to `gate`, for which all but the first take one more input, before [B], the state_out of the
    gate before. remembers: one more input, forgotten [B,1] bool, where the first sensor's memory
    is not of this call.
    """
    more = [*(["before"] if gate else []), *(["forgotten"] if remembers else [])]
    op = Body(["score", "attention_mask", "state", *more])
    rank, real, total = _real_tokens(op, op.inputs["score"])
    given = op("Unsqueeze", [op.inputs["state"], op.ints(1)])
    if gates > 1:
        given = _own_state(op, given, gate)
    here = op("ReduceSum", [op("Cast", [real], {"to": ir.DataType.INT64}), op.ints(1)])
    past_end = op("GreaterOrEqual", [op("Sub", [total, here]), op("Neg", [given])])
    missed = op("And", [op("Less", [given, op.ints(UNDECIDED)]), past_end])
    if remembers:
        pending = op("LessOrEqual", [given, op.ints(UNDECIDED)])
        missed = op("Or", [missed, op("And", [pending, op.inputs["forgotten"]])])
    state = op("Where", [missed, op.ints(OPEN), given])
    ends_here = op("Equal", [state, op.ints(UNDECIDED)])
    # of a decided state the end is -CLOSED or -OPEN: behind no token and before all of them
    end = op("Where", [ends_here, total, op("Neg", [state])])
    asked = op("And", [real, op("Equal", [rank, end])])
    verdict = op("Where", [_score_opens(op), op.ints(OPEN), op.ints(CLOSED)])
    # a verdict is larger than the undecided state it stands for, so the maximum latches it
    news = op("Where", [asked, verdict, state])
    state_out = op("ReduceMax", [news, op.ints(1)], {"keepdims": 1})
    opened = op("Equal", [state_out, op.ints(OPEN)])
    open_ = op("And", [op("And", [real, op("GreaterOrEqual", [rank, end])]), opened])
    flat = op("Squeeze", [state_out, op.ints(1)])
    if gate:
        opens = op("Mul", [op("Sub", [flat, op.ints(CLOSED)]), op.ints(2**gate)])
        joined = op("Add", [op.inputs["before"], opens])
        flat = op("Where", [op("LessOrEqual", [flat, op.ints(UNDECIDED)]), flat, joined])
    return op.function(name, {"open": open_, "state_out": flat}, opset)


def _own_state(op: Body, state: ir.Value, gate: int) -> ir.Value:
    """[B,1]: one gate's bit of a decided state. Div of int64 truncates; undecided is left alone."""
    two = op.ints(2)
    upper = op("Div", [op("Sub", [state, op.ints(CLOSED)]), op.ints(2**gate)])
    bit = op("Sub", [upper, op("Mul", [op("Div", [upper, two]), two])])
    undecided = op("LessOrEqual", [state, op.ints(UNDECIDED)])
    return op("Where", [undecided, state, op("Add", [bit, op.ints(CLOSED)])])
