"""The guard's model-local functions, sensor and gates: the law of `semantics` in ONNX operators.

Written from the law, never from the PyTorch reference. Every function computes in float32 whatever
the model's dtype. Arrays are inputs, so that they stand in the stored file as initialisers that a
reader can find.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from guardbake.semantics import (
    CLOSED,
    IMAGES,
    LAST,
    OPEN,
    POOLED,
    SUM,
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

    def constant(self, value: npt.ArrayLike, dtype: type[np.generic]) -> ir.Value:
        tensor = ir.tensor(np.array(value, dtype=dtype))
        return self._append(ir.node("Constant", [], attributes={"value": tensor}))

    def index(self, place: int) -> ir.Value:
        """[]: what `Gather` takes one column out by."""
        return self.constant(place, np.int64)

    def ints(self, *values: int) -> ir.Value:
        return self.constant(list(values), np.int64)

    def number(self, value: float, dtype: type[np.generic] = np.int64) -> ir.Value:
        """[1,1], the rank of what it meets: TensorRT would add a layer to broadcast a scalar."""
        return self.constant([[value]], dtype)

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
    """(features [B,S,2] of each reading, thresholds [3], real [B,S] bool, tokens [B,1], image_mask
    [B,S] bool, memory [B,3]) -> score [B,S], memory_out [B,3].

    real, tokens: from `tokens_function`, of the same call.
    """
    op, f = _summed(readings, ["real", "tokens", "image_mask", "memory"])
    image = op("And", [op.inputs["image_mask"], op.inputs["real"]])
    zero = op.number(0.0, np.float32)
    last, pooled = (op("Gather", [f, op.index(each)], {"axis": -1}) for each in (LAST, POOLED))
    total = _running(op, SUM, op("Where", [image, pooled, zero]))
    images = _running(op, IMAGES, op("Cast", [image], {"to": ir.DataType.FLOAT}))
    mean = op("Div", [total, images])  # of no images no number, and not asked for
    text, visual, seen = (
        op("Gather", [op.inputs["thresholds"], op.index(each)], {"axis": 0}) for each in range(3)
    )
    visual = op("Min", [visual, op("Sub", [seen, mean])])
    threshold = op("Where", [op("Greater", [images, zero]), visual, text])
    ends = [op("Gather", [each, op.ints(-1)], {"axis": 1}) for each in (total, images)]
    after = op("Concat", [*ends, op.inputs["tokens"]], {"axis": 1})
    score = op("Sub", [last, threshold])
    return op.function(name, {"score": score, "memory_out": after}, opset)


def _running(op: Body, column: int, amounts: ir.Value) -> ir.Value:
    """[B,S]: what the memory's column holds, and the sum of the amounts [B,S] up to each token."""
    carried = op("Gather", [op.inputs["memory"], op.ints(column)], {"axis": 1})
    return op("Add", [carried, op("CumSum", [amounts, op.constant(1, np.int64)])])


def _summed(readings: int, more: Sequence[str]) -> tuple[Body, ir.Value]:
    """A body with an input for each reading's features, and their sum."""
    names = [f"features_{index}" for index in range(readings)]
    op = Body([*names, "thresholds", *more])
    total = op.inputs[names[0]]
    for name in names[1:]:
        total = op("Add", [total, op.inputs[name]])
    return op, total


def token_gate_function(name: str, packed: bool, opset: int) -> ir.Function:
    """(score [B,S], real [B,S] bool) -> open [B,S] bool.

    packed: there is no padding, and so no mask: (score) -> open, of whatever shape.
    """
    op = Body(["score"] if packed else ["score", "real"])
    opens = op("Not", [_score_closes(op)])
    if not packed:
        opens = op("And", [opens, op.inputs["real"]])
    return op.function(name, {"open": opens}, opset)


def gate_function(spec: GuardSpec, gate: int, packed: bool, opset: int) -> ir.Function:
    """The function of one of the spec's gates, under its name in the graph.

    packed: of a graph whose tokens are packed, which a gate of profile token alone can serve.
    """
    tag = f"{gate}_{spec.digest[:12]}"
    if spec.profile == "token":
        return token_gate_function(f"GuardbakeTokenGate_{tag}", packed, opset)
    return sequence_gate_function(f"GuardbakeSequenceGate_{tag}", gate, len(spec.sensors), opset)


def sequence_gate_function(name: str, gate: int, gates: int, opset: int) -> ir.Function:
    """(score [B,S], asked [B,S] bool, from_end [B,S] bool, known [B,1]) -> open [B,S] bool,
    state_out [B] int64.

    gate: which one of how many gates. asked, from_end, known: from `tokens_function`, for all
    gates. state_out holds the verdicts of gates 0 to `gate`, for which all but the first take one
    more input, before [B], the state_out of the gate before.
    """
    op = Body(["score", "asked", "from_end", "known", *(["before"] if gate else [])])
    known = op.inputs["known"] if gates == 1 else _own_state(op, gate)
    verdict = op("Where", [_score_closes(op), op.number(CLOSED), op.number(OPEN)])
    # a verdict is larger than the undecided state it stands for, so the maximum latches it
    news = op("Where", [op.inputs["asked"], verdict, known])
    state_out = op("ReduceMax", [news, op.ints(1)], {"keepdims": 1})
    opened = op("Equal", [state_out, op.number(OPEN)])
    open_ = op("And", [op.inputs["from_end"], opened])
    if gate:  # undecided and closed the state is as the gates before left it
        opened = op("Squeeze", [opened, op.ints(1)])
        before = op.inputs["before"]
        state_out = op("Where", [opened, op("Add", [before, op.ints(2**gate)]), before])
    else:
        state_out = op("Squeeze", [state_out, op.ints(1)])
    return op.function(name, {"open": open_, "state_out": state_out}, opset)


def _score_closes(op: Body) -> ir.Value:
    """[B,S] bool; a score that is not a number does not, as in the law."""
    return op("LessOrEqual", [op.inputs["score"], op.number(0.0, np.float32)])


def _own_state(op: Body, gate: int) -> ir.Value:
    """[B,1]: one gate's bit of a decided state; an undecided one is left alone."""
    known = op.inputs["known"]
    upper = op("Div", [op("Sub", [known, op.number(CLOSED)]), op.number(2**gate)])
    own = op("Add", [op("Mod", [upper, op.number(2)]), op.number(CLOSED)])
    undecided = op("LessOrEqual", [known, op.number(UNDECIDED)])
    return op("Where", [undecided, known, own])
