"""Faults in the decoder's graph, manifest and certificate written again around each of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir

from guardbake.bundle.manifest import DECODER
from guardbake.passes.functions import DOMAIN, token_gate_function
from guardbake.passes.locate import locate
from guardbake.passes.stream import residual_sum
from guardbake.site import Site, site_from_str

from tests.mutation.bundles import in_graph, mend, turned_inside, turned_outside
from tests.mutation.fault import Fault

Change = Callable[[ir.Model], None]


def calls(model: ir.Model, role: str) -> list[ir.Node]:
    """The guard's nodes of one role (Edit, Reading, Tokens, Sensor, Gate), in order."""
    return [n for n in model.graph if n.domain == DOMAIN and role in n.op_type]


def site_of(node: ir.Node) -> Site:
    return site_from_str(node.metadata_props["guardbake.site"])


def array_of(node: ir.Node, key: str) -> ir.Value:
    """The guard node's initialiser of that name."""
    return next(v for v in node.inputs if v is not None and str(v.name).endswith(f"/{key}"))


def change_array(value: ir.Value, change: Callable[[np.ndarray], np.ndarray]) -> None:
    assert value.const_value is not None
    value.const_value = ir.tensor(change(value.const_value.numpy().copy()), name=value.name)


def renumber(role: str, key: str, change: Callable[[np.ndarray], np.ndarray]) -> Change:
    return lambda model: change_array(array_of(calls(model, role)[0], key), change)


def strip_edit(model: ir.Model) -> None:
    """The node is gone; the FFN output feeds what the edit fed."""
    edit = calls(model, "Edit")[0]
    y = edit.inputs[0]
    assert y is not None
    edit.outputs[0].replace_all_uses_with(y)
    model.graph.remove(edit)


def strip_guard(model: ir.Model) -> None:
    for edit in calls(model, "Edit"):
        y = edit.inputs[0]
        assert y is not None
        edit.outputs[0].replace_all_uses_with(y)
        model.graph.remove(edit)
    model.graph.outputs[:] = [
        v for v in model.graph.outputs if not str(v.name).startswith("guard_")
    ]
    for node in reversed([n for n in model.graph if n.domain == DOMAIN]):
        model.graph.remove(node)
    model.metadata_props.clear()
    model.functions.clear()


def total_after(model: ir.Model, edit: ir.Node) -> ir.Node:
    """The residual add that reads an edit's output."""
    node = residual_sum(site_of(edit), edit.outputs[0]).producer()
    assert node is not None
    return node


def feed_instead(reader: ir.Node, old: ir.Value, new: ir.Value) -> None:
    for index, value in enumerate(reader.inputs):
        if value is old:
            reader.replace_input_with(index, new)


def join_times_nothing(model: ir.Model, value: ir.Value, after: ir.Node) -> None:
    """Add nothing times `value` to what `after` gives, so that a path leads to the logits."""
    zero = ir.val("nothing", const_value=ir.tensor(np.zeros(1, np.float32), name="nothing"))
    model.graph.register_initializer(zero)
    silent = ir.node("Mul", [value, zero], name="silent")
    total = after.outputs[0]
    joined = ir.node("Add", [total, silent.outputs[0]], name="joined")
    total.replace_all_uses_with(joined.outputs[0])
    joined.replace_input_with(0, total)
    model.graph.insert_after(after, [silent, joined])


def rewire(model: ir.Model) -> None:
    """The residual add reads the FFN output past the edit, which still reaches the logits."""
    edit = calls(model, "Edit")[0]
    y, total = edit.inputs[0], total_after(model, edit)
    assert y is not None
    feed_instead(total, edit.outputs[0], y)
    join_times_nothing(model, edit.outputs[0], total)


def rewire_a_copy(model: ir.Model) -> None:
    """The same, by a copy of the product: nobody but the guard reads the FFN output."""
    edit = calls(model, "Edit")[0]
    y, total = edit.inputs[0], total_after(model, edit)
    assert y is not None
    product = y.producer()
    assert product is not None
    twin = ir.node(product.op_type, list(product.inputs), name="twin")
    model.graph.insert_after(product, twin)
    feed_instead(total, edit.outputs[0], twin.outputs[0])
    join_times_nothing(model, edit.outputs[0], total)


def swap_layers(model: ir.Model) -> None:
    """Each of two edits holds the other one's numbers."""
    one, two = calls(model, "Edit")[:2]
    for mine, theirs in zip(one.inputs, two.inputs, strict=True):
        if mine is not None and theirs is not None and mine.is_initializer():
            mine.const_value, theirs.const_value = theirs.const_value, mine.const_value


def trade_places(model: ir.Model) -> None:
    """Each of two edits stands, whole, at the other one's layer."""
    edits = calls(model, "Edit")[:2]
    totals = [total_after(model, edit) for edit in edits]
    values = [edit.inputs[0] for edit in edits]
    given = [edit.outputs[0] for edit in edits]
    for edit, total, value, old, new in zip(
        edits, totals, values[::-1], given, given[::-1], strict=True
    ):
        edit.replace_input_with(0, value)
        feed_instead(total, old, new)
    model.graph.sort()


def in_body(role: str, op_type: str, change: Callable[[ir.Node], None]) -> Change:
    """Change the last node of that type in the function of the role's first call."""

    def plant(model: ir.Model) -> None:
        body = model.functions[calls(model, role)[0].op_identifier()]
        change([n for n in body if n.op_type == op_type][-1])

    return plant


def past(index: int) -> Callable[[ir.Node], None]:
    """Let those who read the node's output read one of its inputs."""

    def change(node: ir.Node) -> None:
        value = node.inputs[index]
        assert value is not None
        same = ir.node("Identity", [value])
        graph = node.graph
        assert graph is not None
        place = next((i for i, v in enumerate(graph.outputs) if v is node.outputs[0]), None)
        graph.insert_after(node, same)
        if place is None:
            node.outputs[0].replace_all_uses_with(same.outputs[0])
            return
        name, node.outputs[0].name = node.outputs[0].name, "old"
        same.outputs[0].name = name
        graph.outputs[place] = same.outputs[0]

    return change


def profile_of_tokens(model: ir.Model) -> None:
    """The gate looks at each token's own score, and latches nothing."""
    gate = calls(model, "Gate")[0]
    function = token_gate_function(gate.op_type, False, model.opset_imports[""])
    score, _, from_end = gate.inputs[:3]
    state = next(v for v in model.graph.inputs if v.name == "guard_state")
    model.functions[function.identifier()] = function
    fresh = ir.Node(DOMAIN, gate.op_type, [score, from_end], num_outputs=1, name=gate.name)
    kept = ir.node("Identity", [state], name="kept")
    model.graph.insert_before(gate, [fresh, kept])
    for old, new in zip(gate.outputs, (fresh.outputs[0], kept.outputs[0]), strict=True):
        new.name, new.dtype, new.shape = old.name, old.dtype, old.shape
        place = next(i for i, v in enumerate(model.graph.outputs) if v is old)
        model.graph.outputs[place] = new
        old.replace_all_uses_with(new)
    model.graph.remove(gate)


def threshold_as_input(model: ir.Model) -> None:
    """A host may feed a threshold of its own."""
    model.graph.inputs.append(array_of(calls(model, "Sensor")[0], "thresholds"))


def preset_state(model: ir.Model) -> None:
    """A default state, decided and closed: a host that feeds none has no guard."""
    state = next(v for v in model.graph.inputs if v.name == "guard_state")
    state.const_value = ir.tensor(np.ones(1, np.int64), name="guard_state")
    model.graph.register_initializer(state)


def decoy_sensor(model: ir.Model) -> None:
    """The sensor reads the layer below the one it was fitted at."""
    reading = calls(model, "Reading")[-1]
    below = Site(site_of(reading).layer - 1, "residual")
    reading.replace_input_with(0, locate(model.graph, [below])[below].value)


def overflow(model: ir.Model) -> None:
    """Behind the last edit the stream goes through float16 at 100000 times its size."""
    total = total_after(model, calls(model, "Edit")[-1])
    stream, value = total.outputs[0], total.outputs[0]
    readers = [use for use in stream.uses()]
    large = ir.val("large", const_value=ir.tensor(np.float32([1e5]), name="large"))
    model.graph.register_initializer(large)
    steps: list[tuple[str, list[ir.Value], dict[str, int]]] = [
        ("Mul", [large], {}),
        ("Cast", [], {"to": int(ir.DataType.FLOAT16)}),
        ("Cast", [], {"to": int(ir.DataType.FLOAT)}),
        ("Div", [large], {}),
    ]
    after = total
    for number, (op, more, attributes) in enumerate(steps):
        node = ir.node(op, [value, *more], attributes=attributes, name=f"overflow {number}")
        model.graph.insert_after(after, node)
        after, value = node, node.outputs[0]
    for use in readers:
        use.node.replace_input_with(use.idx, value)


def ten_bits(model: ir.Model) -> None:
    """Every product of the stream with weights sees ten bits of mantissa, as TF32 keeps them."""
    for node in [n for n in model.graph if n.op_type == "MatMul"]:
        value = node.inputs[0]
        assert value is not None
        half = ir.node("Cast", [value], attributes={"to": int(ir.DataType.FLOAT16)})
        wide = ir.node("Cast", half.outputs, attributes={"to": int(ir.DataType.FLOAT)})
        model.graph.insert_before(node, [half, wide])
        node.replace_input_with(0, wide.outputs[0])


def truncate(bundle: Path) -> None:
    path = bundle / DECODER
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    mend(bundle)


def one_step(array: np.ndarray) -> np.ndarray:
    array.flat[-1] = np.nextafter(array.flat[-1], np.float32(np.inf))
    return array


def with_nan(array: np.ndarray) -> np.ndarray:
    array.flat[0] = np.nan
    return array


def flip_row(array: np.ndarray) -> np.ndarray:
    array[int(np.abs(array).max(axis=1).argmax())] *= -1
    return array


PRESENCE: dict[str, Change] = {
    "edit node stripped": strip_edit,
    "whole guard stripped": strip_guard,
    "bypass by re-wiring": rewire,
    "bypass by a copied product": rewire_a_copy,
    "basis rotated inside its span": renumber("Edit", "basis", turned_inside),
    "basis rotated outside its span": renumber("Edit", "basis", turned_outside),
    "basis row flipped": renumber("Edit", "basis", flip_row),
    "basis x 1.01": renumber("Edit", "basis", lambda a: a * np.float32(1.01)),
    "basis one rounding step away": renumber("Edit", "basis", one_step),
    "NaN in the basis": renumber("Edit", "basis", with_nan),
    "sign of the edit flipped": renumber("Edit", "scale", np.negative),
    "alpha x 0.9": renumber("Edit", "scale", lambda a: a * np.float32(0.9)),
    "centre dropped": renumber("Edit", "offset", np.zeros_like),
    "layers swapped": swap_layers,
    "edits trade places": trade_places,
    "threshold at infinity": renumber("Sensor", "thresholds", lambda a: np.full_like(a, np.inf)),
    "threshold made an input": threshold_as_input,
    "sensor direction turned": renumber("Reading", "directions", np.negative),
    "sensor at another layer": decoy_sensor,
    "gate of another profile": profile_of_tokens,
    "gate state preset": preset_state,
    "gate that is never asked": in_body("Tokens", "Where", past(2)),
    "edit that ignores the gate": in_body("Edit", "Where", past(1)),
    "edit that gives its input": in_body("Edit", "Where", past(2)),
}
FAULTS: tuple[Fault[Path], ...] = (
    *(Fault(name, "graph", "presence", in_graph(change)) for name, change in PRESENCE.items()),
    Fault("graph cut in half", "graph", "data", truncate),
    Fault("float16 overflow behind the guard", "graph", "parity", in_graph(overflow)),
    Fault("products as TF32 makes them", "graph", "parity", in_graph(ten_bits)),
)
