"""A gate per layer in the graph: the law's numbers, one state, and no wire to another's edit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from guardbake import semantics as law
from guardbake.errors import IntegrityError
from guardbake.passes.functions import sequence_gate_function
from guardbake.passes.insert import InsertGuard
from guardbake.passes.verify import VerifyGuard
from guardbake.site import Site
from guardbake.spec import MAX_GATES, GuardSpec

from tests.passes.conftest import agree, feeds_for

LATER = (Site(1, "residual"),)
PROFILES = ("token", "sequence")


def two_gates(guard: Any, profile: str = "sequence", **changes: Any) -> GuardSpec:
    """Gate 0 opens layer 1; gate 1 reads what that left and opens layer 2."""
    made: GuardSpec = guard(profile, "steer", later=LATER, edits=(1, 2), **changes)
    return made


def both(feeds: dict[str, Any]) -> np.ndarray:
    return np.stack([feeds["guard_open_0"], feeds["guard_open_1"]])


def spread(lab: Any, guard: Any, profile: str, **changes: Any) -> tuple[GuardSpec, dict[str, Any]]:
    """A guard, and feeds whose rows open no, one, the other and both gates, or were decided."""
    spec = two_gates(guard, profile, **changes)
    feeds = feeds_for(lab, spec, batch=24)
    if profile == "sequence":
        feeds["guard_state"] = np.array([0] * 18 + [-2, -5, 1, 2, 3, 4])
    return spec, feeds


@pytest.mark.parametrize(
    ("profile", "pools"), [("token", False), ("sequence", False), ("sequence", True)]
)
def test_the_graph_computes_the_law(lab: Any, guard: Any, profile: str, pools: bool) -> None:
    spec, feeds = spread(lab, guard, profile, pools=pools)
    toy = lab.toy()
    expected = toy.law(spec, feeds)
    opened = both(expected)
    assert (opened[0] != opened[1]).any()
    assert 0 < opened.sum() < opened.size
    if profile == "sequence":
        assert {1, 2, 3, 4} <= set(expected["guard_state_out"].tolist())
    agree(lab.run(lab.insert(toy, spec), feeds), expected)


def test_a_later_gate_sees_what_earlier_edits_left(lab: Any, guard: Any) -> None:
    """So does the graph, by the test above; here that it makes a difference."""
    spec, feeds = spread(lab, guard, "sequence", strength=3.0)
    shut = feeds | {"guard_state": np.full_like(feeds["guard_state"], law.CLOSED)}
    scores, unedited = (lab.toy().law(spec, fed)["guard_score_1"] for fed in (feeds, shut))
    moved = np.abs(scores - unedited).max(axis=1) > 0.1
    assert 0 < moved.sum() < len(moved)


@pytest.mark.parametrize("stops", [[5], [2, 5], [1, 2, 3, 4, 5]])
def test_chunks_agree_with_the_whole(lab: Any, guard: Any, stops: list[int]) -> None:
    spec, feeds = spread(lab, guard, "sequence")
    feeds["guard_state"] = -feeds["attention_mask"].sum(axis=1)
    expected = lab.toy().law(spec, feeds)
    assert set(expected["guard_state_out"].tolist()) == {1, 2, 3, 4}
    content = ir.to_proto(lab.insert(lab.toy(), spec)).SerializeToString()
    session = ort.InferenceSession(content, providers=["CPUExecutionProvider"])
    state, start, parts = feeds["guard_state"], 0, []
    names = ["guard_open_0", "guard_open_1", "guard_state_out"]
    for stop in stops:
        some = {
            "inputs_embeds": feeds["inputs_embeds"][:, start:stop],
            "attention_mask": feeds["attention_mask"][:, :stop],
            "guard_state": state,
        }
        first, second, state = session.run(names, some)
        parts.append(np.stack([first, second]))
        start = stop
    assert state.tolist() == expected["guard_state_out"].tolist()
    assert (np.concatenate(parts, axis=-1) == both(expected)).all()


def test_a_missed_end_opens_every_gate(lab: Any, guard: Any) -> None:
    spec = two_gates(guard, threshold=3e38)  # no score would
    feeds = feeds_for(lab, spec)
    cached = np.ones((4, 4), np.int64)
    feeds["attention_mask"] = np.concatenate([cached, feeds["attention_mask"]], axis=1)
    feeds["guard_state"] = np.array([-3, -6, -20, 3])
    toy = lab.toy()
    expected = toy.law(spec, feeds)
    assert expected["guard_state_out"].tolist() == [4, 1, -20, 3]
    agree(lab.run(lab.insert(toy, spec), feeds), expected)


@pytest.mark.parametrize("gate", [1, MAX_GATES - 1])
def test_the_last_of_many_gates_has_its_bit(gate: int) -> None:
    """One gate's function alone, its number among the largest that a spec may have."""
    function = sequence_gate_function("gate", gate, MAX_GATES, 23)
    inputs = {
        "score": np.array([[-1], [1], [1], [-1], [1]], np.float32),
        "asked": np.array([[True], [True], [False], [False], [False]]),
        "from_end": np.array([[True], [True], [False], [True], [True]]),
        "known": np.array([[0], [0], [-2], [1 + 2**gate], [2**MAX_GATES - 2**gate]], np.int64),
        "before": np.array([1, 2, -2, 1, 2], np.int64),
    }
    assert list(inputs) == [value.name for value in function.inputs]
    values = [
        ir.val(name, ir.DataType.from_numpy(array.dtype), array.shape)
        for name, array in inputs.items()
    ]
    call = ir.Node("guardbake", "gate", values, num_outputs=2, name="call")
    types = (ir.DataType.BOOL, [5, 1]), (ir.DataType.INT64, [5])
    for out, name, (dtype, shape) in zip(call.outputs, ("open", "after"), types, strict=True):
        out.name, out.dtype, out.shape = name, dtype, ir.Shape(shape)
    graph = ir.Graph(
        values, call.outputs, nodes=[call], opset_imports={"": 23, "guardbake": 1}, name="g"
    )
    proto = ir.to_proto(ir.Model(graph, ir_version=11, functions=[function]))
    onnx.checker.check_model(proto, full_check=True)
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    opened, after = session.run(["open", "after"], inputs)
    bit = 2**gate
    assert opened[:, 0].tolist() == [False, True, False, True, False]
    assert after.tolist() == [1, 2 + bit, -2, 1 + bit, 2]


# ---- faults


def node(model: ir.Model, part: str) -> ir.Node:
    return next(n for n in model.graph if part in str(n.name))


def swap_inputs(one: str, other: str, index: int) -> Callable[[ir.Model], None]:
    """Two guard nodes read each other's input `index`."""

    def plant(model: ir.Model) -> None:
        first, second = node(model, one), node(model, other)
        values = first.inputs[index], second.inputs[index]
        first.replace_input_with(index, values[1])
        second.replace_input_with(index, values[0])
        for late in (first, second):  # behind what they now read
            sources = [v.producer() for v in late.inputs if v is not None]
            order = list(model.graph)
            last = max((s for s in sources if s is not None), key=order.index)
            if order.index(last) > order.index(late):
                model.graph.remove(late)
                model.graph.insert_after(last, late)

    return plant


def give(part: str, index: int, source: str, output: int) -> Callable[[ir.Model], None]:
    """The guard node whose name has `part` reads another guard node's output."""
    return lambda model: node(model, part).replace_input_with(
        index, node(model, source).outputs[output]
    )


def state_for_before(model: ir.Model) -> None:
    state = next(v for v in model.graph.inputs if v.name == "guard_state")
    node(model, "/gate.1/").replace_input_with(4, state)


def first_verdict_as_state(model: ir.Model) -> None:
    """What the caller gets back knows nothing of the last gate."""
    place = next(i for i, v in enumerate(model.graph.outputs) if v.name == "guard_state_out")
    model.graph.outputs[place].name = "hidden"
    first = node(model, "/gate.0/").outputs[1]
    first.name = "guard_state_out"
    model.graph.outputs[place] = first


def swap_names(model: ir.Model) -> None:
    """What the gates show outside is each other's."""
    one, other = (node(model, f"/gate.{gate}/").outputs[0] for gate in (0, 1))
    one.name, other.name = "held", one.name
    one.name = "guard_open_1"


FAULTS: dict[str, Callable[[ir.Model], None]] = {
    "edits behind each other's gates": swap_inputs("layers.1.ffn", "layers.2.ffn", 1),
    "both edits behind the first gate": give("layers.2.ffn", 1, "/gate.0/", 0),
    "the second gate by the first score": give("/gate.1/", 0, "/sensor.0/", 0),
    "the second sensor by the first reading": give("/sensor.1/", 0, "reading.0", 0),
    "the second sensor elsewhere": give("reading.1", 0, "residual_0", 0),
    "the first verdict forgotten": state_for_before,
    "the last verdict withheld": first_verdict_as_state,
    "answers under each other's names": swap_names,
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_refused(lab: Any, guard: Any, name: str) -> None:
    spec = two_gates(guard)
    model = lab.insert(lab.toy(), spec)
    assert len(VerifyGuard(spec, "the toy")(model).nodes) == 9
    FAULTS[name](model)
    with pytest.raises(IntegrityError, match="do not ship"):
        VerifyGuard(spec, "the toy")(lab.reloaded(model))


def test_a_gate_s_function_has_the_gate_s_number(lab: Any, guard: Any) -> None:
    """The second gate reads another bit of the state."""
    spec = two_gates(guard)
    model = lab.insert(lab.toy(), spec)
    key = next(key for key in model.functions if "SequenceGate_1" in key[1])
    model.functions[key] = sequence_gate_function(key[1], 1, 2, 23)
    VerifyGuard(spec, "the toy")(model)
    model.functions[key] = sequence_gate_function(key[1], 2, 3, 23)
    with pytest.raises(IntegrityError, match="another body"):
        VerifyGuard(spec, "the toy")(model)


@pytest.mark.parametrize("profile", PROFILES)
def test_what_is_added_and_nothing_else(lab: Any, guard: Any, profile: str) -> None:
    toy = lab.toy()
    InsertGuard(two_gates(guard, profile))(toy.model)
    names = [v.name for v in toy.model.graph.outputs]
    state = ["guard_state_out"] if profile == "sequence" else []
    each = [f"guard_{what}_{gate}" for gate in (0, 1) for what in ("score", "open")]
    assert names == ["logits", *each, *state]
