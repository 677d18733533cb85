"""Ways to break a guarded graph, or to go round its guard; each gets one as read from a file."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

Fault = Callable[[ir.Model], None]


def node(model: ir.Model, end: str) -> ir.Node:
    return next(n for n in model.graph if str(n.name).endswith(end))


def y_of(model: ir.Model, layer: int = 2) -> ir.Value:
    return node(model, f"layers.{layer}/mlp/down_proj/MatMul").outputs[0]


def constant(model: ir.Model, end: str) -> ir.Value:
    return next(v for name, v in model.graph.initializers.items() if name.endswith(end))


def renumber(end: str, change: Callable[[np.ndarray], np.ndarray]) -> Fault:
    def plant(model: ir.Model) -> None:
        value = constant(model, end)
        assert value.const_value is not None
        array = change(value.const_value.numpy().copy())
        value.const_value = ir.tensor(array, name=value.name)
        if not np.array_equal(array.shape, value.shape or ()):
            value.shape = ir.Shape(array.shape)

    return plant


def one_ulp(array: np.ndarray) -> np.ndarray:
    array.flat[-1] = np.nextafter(array.flat[-1], np.float32(np.inf))
    return array


def flip_column(array: np.ndarray) -> np.ndarray:
    array[:, 0] *= -1
    return array


def bypass(model: ir.Model) -> None:
    """The residual add reads y again; the guard stays in the file and feeds nobody."""
    node(model, "residual_2").replace_input_with(1, y_of(model))


def bypass_and_feign(model: ir.Model) -> None:
    """As before, and the edit still reaches the logits through a product with nothing."""
    bypass(model)
    zero = ir.val("zero", const_value=ir.tensor(np.zeros(1, np.float32), name="zero"))
    model.graph.register_initializer(zero)
    head = node(model, "head")
    last, edited = head.inputs[0], node(model, "ffn_output/" + tag(model) + "/edit").outputs[0]
    nothing = ir.node("Mul", [edited, zero], name="nothing")
    joined = ir.node("Add", [last, nothing.outputs[0]], name="joined")
    model.graph.insert_before(head, [nothing, joined])
    head.replace_input_with(0, joined.outputs[0])


def tag(model: ir.Model) -> str:
    return model.metadata_props["guardbake.guard"][:12]


def expose_y(model: ir.Model) -> None:
    model.graph.outputs.append(y_of(model))


def read_y(model: ir.Model) -> None:
    model.graph.append(ir.node("Relu", [y_of(model)], name="new reader"))


def second_guard_node_of_the_same_name(model: ir.Model) -> None:
    """A way round that wears the guard's own domain, name and function."""
    edit = node(model, "/edit")
    twin = ir.Node("guardbake", "Through", [y_of(model)], num_outputs=1, name=edit.name)
    body_in = ir.Value(name="a")
    same = ir.node("Identity", [body_in])
    same.outputs[0].name = "b"
    graph = ir.Graph([body_in], same.outputs, nodes=[same], opset_imports={"": 23})
    model.functions["guardbake", "Through", ""] = ir.Function(
        "guardbake", "Through", graph=graph, attributes=()
    )
    model.graph.insert_before(edit, twin)
    node(model, "residual_2").replace_input_with(1, twin.outputs[0])


def cut_off(model: ir.Model) -> None:
    """Nothing after the edit reaches the logits."""
    node(model, "head").replace_input_with(0, node(model, "residual_1").outputs[0])


def edit_another_layer(model: ir.Model) -> None:
    node(model, "/edit").replace_input_with(0, y_of(model, 1))


def swap_body(function: str, op: str, replace: Callable[[ir.Node], ir.Value | None]) -> Fault:
    """Another way through one function: its last output that a node of type `op` gives is its
    input instead."""

    def plant(model: ir.Model) -> None:
        body = next(f for key, f in model.functions.items() if function in key[1])
        given = {id(value) for value in body.outputs}
        last = [n for n in body if n.op_type == op and id(n.outputs[0]) in given][-1]
        value = replace(last)
        assert value is not None
        name = last.outputs[0].name
        same = ir.node("Identity", [value])
        last.outputs[0].name = "old"
        same.outputs[0].name = name
        body.append(same)
        index = next(i for i, out in enumerate(body.outputs) if out is last.outputs[0])
        body.outputs[index] = same.outputs[0]

    return plant


def other_constant(model: ir.Model) -> None:
    """The sequence gate's verdict: closed for every score."""
    body = next(f for key, f in model.functions.items() if "SequenceGate" in key[1])
    twos = [
        n
        for n in body
        if n.op_type == "Constant" and n.attributes["value"].as_tensor().numpy().tolist() == [[2]]
    ]
    twos[0].attributes["value"] = ir.AttrTensor("value", ir.tensor(np.array([[1]], np.int64)))


def drop(end: str) -> Fault:
    def plant(model: ir.Model) -> None:
        victim = node(model, end)
        victim.outputs[0].replace_all_uses_with(y_of(model))
        model.graph.remove(victim)

    return plant


def drop_function(model: ir.Model) -> None:
    del model.functions[next(key for key in model.functions if "Edit" in key[1])]


def drop_input(model: ir.Model) -> None:
    edit = node(model, "/edit")
    edit.resize_inputs(len(edit.inputs) - 1)


def swap_gate_input(model: ir.Model) -> None:
    """The gate reads a number that is always below zero."""
    sensor = node(model, f"sensor.0/{tag(model)}")
    score = sensor.outputs[0]
    low = ir.node("Sub", [score, score], name="low")
    model.graph.insert_after(sensor, low)
    node(model, f"gate.0/{tag(model)}").replace_input_with(0, low.outputs[0])


def swap_mask(model: ir.Model) -> None:
    """The guard reads an input that no runtime knows as the mask."""
    other = ir.val("other_mask", ir.DataType.INT64, ["batch", "total"])
    model.graph.inputs.append(other)
    node(model, f"tokens/{tag(model)}").replace_input_with(1, other)


def swap_known(model: ir.Model) -> None:
    """The gate reads the state as the caller gave it, whatever the caller let slip."""
    state = next(v for v in model.graph.inputs if v.name == "guard_state")
    axis = ir.node("Constant", [], attributes={"value_ints": [1]}, name="axis")
    raw = ir.node("Unsqueeze", [state, axis.outputs[0]], name="raw")
    gate = node(model, f"gate.0/{tag(model)}")
    model.graph.insert_before(gate, [axis, raw])
    gate.replace_input_with(3, raw.outputs[0])


def drop_output(model: ir.Model) -> None:
    """The last of what the tokens tell is not handed on: the gate takes another for it."""
    told = node(model, f"tokens/{tag(model)}")
    state = next(v for v in model.graph.inputs if v.name == "guard_state")
    told.outputs[2].replace_all_uses_with(state)
    told.resize_outputs(2)


def swap_told(model: ir.Model) -> None:
    """What the guard knows of the tokens is taken for each other."""
    gate = node(model, f"gate.0/{tag(model)}")
    asked, from_end = gate.inputs[1:3]
    gate.replace_input_with(1, from_end)
    gate.replace_input_with(2, asked)


def shorten(model: ir.Model) -> None:
    """The tokens are counted on a value that has only one."""
    tokens = node(model, f"tokens/{tag(model)}")
    place = ir.node("Constant", [], attributes={"value_ints": [0]}, name="place")
    first = ir.node("Gather", [tokens.inputs[0], place.outputs[0]], {"axis": 1}, name="first")
    model.graph.insert_before(tokens, [place, first])
    tokens.replace_input_with(0, first.outputs[0])


def swap_open(model: ir.Model) -> None:
    """The edit reads another open value."""
    gate = node(model, f"gate.0/{tag(model)}")
    never = ir.node("Xor", [gate.outputs[0], gate.outputs[0]], name="never")
    model.graph.insert_after(gate, never)
    node(model, "/edit").replace_input_with(1, never.outputs[0])


def swap_sensor(model: ir.Model) -> None:
    node(model, "/reading.0").replace_input_with(0, node(model, "residual_1").outputs[0])


def other_digest(model: ir.Model) -> None:
    model.metadata_props["guardbake.guard"] = "0" * 64


def no_digest(model: ir.Model) -> None:
    del model.metadata_props["guardbake.guard"]


def overridable(model: ir.Model) -> None:
    """An initialiser that is also an input: a host may feed another threshold."""
    model.graph.inputs.append(constant(model, "/thresholds"))


def compute_input(name: str) -> Fault:
    """The graph computes for itself what the caller should tell the gate."""

    def plant(model: ir.Model) -> None:
        place = next(i for i, v in enumerate(model.graph.inputs) if v.name == name)
        old = model.graph.inputs.pop(place)
        outside = ir.val(f"{name}_outside", old.dtype, old.shape)
        model.graph.inputs.append(outside)
        inside = ir.node("Sub", [outside, outside], name="nothing")
        model.graph.insert_before(model.graph[0], inside)
        old.replace_all_uses_with(inside.outputs[0])
        old.name, inside.outputs[0].name = "gone", name

    return plant


def preset_state(model: ir.Model) -> None:
    """A default state, decided and closed: a host that feeds nothing has no guard."""
    state = next(v for v in model.graph.inputs if v.name == "guard_state")
    state.const_value = ir.tensor(np.ones(1, np.int64), name="guard_state")
    model.graph.register_initializer(state)


def constant_state(model: ir.Model) -> None:
    preset_state(model)
    model.graph.inputs.remove(next(v for v in model.graph.inputs if v.name == "guard_state"))


def hide(name: str) -> Fault:
    def plant(model: ir.Model) -> None:
        model.graph.outputs.remove(next(v for v in model.graph.outputs if v.name == name))

    return plant


def feign(name: str) -> Fault:
    """An output of the right name that the guard did not compute."""

    def plant(model: ir.Model) -> None:
        place = next(i for i, v in enumerate(model.graph.outputs) if v.name == name)
        real = model.graph.outputs[place]
        fake = ir.node("Identity", [real], name="fake")
        fake.outputs[0].dtype, fake.outputs[0].shape = real.dtype, real.shape
        real.name, fake.outputs[0].name = "real", name
        model.graph.append(fake)
        model.graph.outputs[place] = fake.outputs[0]

    return plant


def remove_site(model: ir.Model) -> None:
    matmul = node(model, "layers.2/mlp/down_proj/MatMul")
    matmul.name, matmul.outputs[0].name = "m", "m_out"


FAULTS: dict[str, Fault] = {
    "residual reads y": bypass,
    "residual reads y, edit feigned": bypass_and_feign,
    "y is an output": expose_y,
    "a new node reads y": read_y,
    "a twin of the edit": second_guard_node_of_the_same_name,
    "edit cut off from the logits": cut_off,
    "edit at another layer": edit_another_layer,
    "one basis entry": renumber("/basis", one_ulp),
    "one offset entry": renumber("/offset", one_ulp),
    "one scale": renumber("/scale", one_ulp),
    "alpha x 0.9": renumber("/scale", lambda a: a * np.float32(0.9)),
    "basis x 1.01": renumber("/basis", lambda a: a * np.float32(1.01)),
    "basis column flipped": renumber("/basis", flip_column),
    "basis zero": renumber("/basis", np.zeros_like),
    "basis of the same bytes and another shape": renumber("/basis", lambda a: a.reshape(5, 16)),
    "basis of the same bytes and another dtype": renumber("/basis", lambda a: a.view(np.int32)),
    "threshold": renumber("/thresholds", one_ulp),
    "threshold infinite": renumber("/thresholds", lambda a: np.full_like(a, np.inf)),
    "direction turned": renumber("/directions", np.negative),
    "centre": renumber("/centre", one_ulp),
    "Where gives y": swap_body("Edit", "Where", lambda n: n.inputs[2]),
    "Where gives edited": swap_body("Edit", "Where", lambda n: n.inputs[1]),
    "gate constant": other_constant,
    "gate function": swap_body("SequenceGate", "Squeeze", lambda n: n.inputs[0]),
    "reading function": swap_body("Reading", "MatMul", lambda n: n.inputs[0]),
    "sensor function": swap_body("Sensor", "Sub", lambda n: n.inputs[0]),
    "edit node removed": drop("/edit"),
    "function removed": drop_function,
    "edit input removed": drop_input,
    "gate input swapped": swap_gate_input,
    "mask swapped": swap_mask,
    "state read past the tokens": swap_known,
    "what is told of tokens swapped": swap_told,
    "what is known withheld": drop_output,
    "tokens counted elsewhere": shorten,
    "tokens function": swap_body("Tokens", "Where", lambda n: n.inputs[2]),
    "open swapped": swap_open,
    "sensor at another site": swap_sensor,
    "digest of another guard": other_digest,
    "no digest": no_digest,
    "initialiser made an input": overridable,
    "mask computed inside": compute_input("attention_mask"),
    "state computed inside": compute_input("guard_state"),
    "state preset": preset_state,
    "state constant": constant_state,
    "no score output": hide("guard_score"),
    "no open output": hide("guard_open"),
    "no state output": hide("guard_state_out"),
    "no logits output": hide("logits"),
    "score output feigned": feign("guard_score"),
    "open output feigned": feign("guard_open"),
    "state output feigned": feign("guard_state_out"),
    "site gone": remove_site,
}
