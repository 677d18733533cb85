"""Faults planted in a sensor that reads two sites and averages over image tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from guardbake.errors import IntegrityError
from guardbake.passes.verify import VerifyGuard
from guardbake.site import Site

SITES = Site(0, "residual"), Site(1, "residual")


def node(model: ir.Model, part: str) -> ir.Node:
    return next(n for n in model.graph if part in str(n.name))


def inner(index: int, value: Callable[[ir.Model], ir.Value], part: str = "/sensor.0/") -> Any:
    """The guard node whose name has `part` reads another value as its input `index`."""
    return lambda model: node(model, part).replace_input_with(index, value(model))


def before(model: ir.Model, part: str, op: str, *values: ir.Value) -> ir.Value:
    """A value computed just before a guard node."""
    made = ir.node(op, values, name="planted")
    model.graph.insert_before(node(model, part), made)
    return made.outputs[0]


def graph_input(model: ir.Model, name: str) -> ir.Value:
    return next(v for v in model.graph.inputs if v.name == name)


def no_pictures(model: ir.Model) -> ir.Value:
    images = graph_input(model, "guard_image_mask")
    return before(model, "/sensor.0/", "Xor", images, images)


def blank_memory(model: ir.Model) -> ir.Value:
    memory = graph_input(model, "guard_memory")
    return before(model, "/sensor.0/", "Sub", memory, memory)


def never_forgotten(model: ir.Model) -> ir.Value:
    """What the memory would hold, had it seen the tokens before this call."""
    memory = graph_input(model, "guard_memory")
    return before(model, "/tokens/", "Add", memory, memory)


def hide(name: str) -> Callable[[ir.Model], None]:
    def plant(model: ir.Model) -> None:
        model.graph.outputs.remove(next(v for v in model.graph.outputs if v.name == name))

    return plant


def renumber(end: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[ir.Model], None]:
    def plant(model: ir.Model) -> None:
        value = next(v for name, v in model.graph.initializers.items() if name.endswith(end))
        value.const_value = ir.tensor(change(value.const_value.numpy()), name=value.name)

    return plant


def preset_memory(model: ir.Model) -> None:
    memory = graph_input(model, "guard_memory")
    memory.const_value = ir.tensor(np.zeros((1, 3), np.float32), name="guard_memory")
    model.graph.register_initializer(memory)


FAULTS: dict[str, Callable[[ir.Model], None]] = {
    "another mask for the images": inner(5, lambda m: graph_input(m, "attention_mask")),
    "pictures blotted out": inner(5, no_pictures),
    "memory blotted out": inner(6, blank_memory),
    "memory preset": preset_memory,
    "no memory output": hide("guard_memory_out"),
    "one reading twice": inner(1, lambda m: node(m, "layers.0.residual").outputs[0]),
    "a reading of another site": inner(
        0, lambda m: node(m, "residual_0").outputs[0], "layers.1.residual"
    ),
    "padding counts": inner(3, lambda m: node(m, "/tokens/").outputs[0]),
    "tokens of another call": inner(4, lambda m: node(m, "/tokens/").outputs[2]),
    "a lost memory is never seen": inner(3, never_forgotten, "/tokens/"),
    "pooled direction flipped": renumber("/directions", lambda a: a * np.float32([1, -1])),
    "threshold for images": renumber("/thresholds", lambda a: a + np.float32([0, 1, 0])),
    "threshold for image tokens": renumber("/thresholds", lambda a: a + np.float32([0, 0, 1])),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_planted_in_a_pooling_sensor_is_refused(lab: Any, guard: Any, name: str) -> None:
    spec = guard("sequence", "steer", sensor=SITES, pools=True)
    model = lab.insert(lab.toy(), spec)
    assert len(VerifyGuard(spec, "the toy")(model).nodes) == 6
    FAULTS[name](model)
    with pytest.raises(IntegrityError, match="do not ship"):
        VerifyGuard(spec, "the toy")(lab.reloaded(model))
