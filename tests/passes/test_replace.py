"""The edit `replace`: what it hears in a text-only call, and what it does when told of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from guardbake import semantics as law
from guardbake.errors import IntegrityError
from guardbake.passes.insert import InsertGuard
from guardbake.passes.verify import VerifyGuard
from guardbake.site import Site

from tests.passes.conftest import agree

LAYERS = (1, 2)
HALF, FFN = ir.DataType.FLOAT16, Site(0, "ffn_output")


def told(lab: Any, **shape: Any) -> dict[str, Any]:
    """Feeds of five rows, of every state, with random text coordinates."""
    feeds = dict(lab.feeds(batch=5, **shape))
    rng = np.random.default_rng(3)
    for layer in LAYERS:
        feeds[f"guard_text_{layer}"] = rng.standard_normal((5, 3)).astype(np.float32)
    return feeds


@pytest.mark.parametrize("strength", [1.0, 2.5, 0.0])
def test_the_graph_computes_the_law(lab: Any, guard: Any, strength: float) -> None:
    """Also what it hears: each row's last real token, behind padding on either side."""
    spec, toy = guard("sequence", "replace", edits=LAYERS, strength=strength), lab.toy()
    feeds = told(lab)
    expected = toy.law(spec, feeds)
    assert {row.tolist() == [0, 0, 0] for row in expected["guard_heard_1"]} == {False}
    agree(lab.run(lab.insert(toy, spec), feeds), expected)
    assert 0 < expected["guard_open"].sum() < expected["guard_open"].size


def test_a_row_of_padding_hears_nothing(lab: Any, guard: Any) -> None:
    spec, toy = guard("sequence", "replace", edits=LAYERS), lab.toy()
    feeds = told(lab)
    feeds["attention_mask"][3] = 0
    got = lab.run(lab.insert(toy, spec), feeds)
    assert (got["guard_heard_2"][3] == 0).all()
    agree(got, toy.law(spec, feeds))


def test_a_shut_call_hears_the_unguarded_model(lab: Any, guard: Any) -> None:
    """What the text-only call must be: the same bits as without a guard, whatever it is told."""
    spec, toy = guard("sequence", "replace", edits=LAYERS), lab.toy()
    feeds = told(lab)
    feeds["guard_state"][:] = law.CLOSED
    plain = lab.run(toy.model, feeds)["logits"]
    model = lab.insert(toy, spec)
    got = lab.run(model, feeds)
    assert got["logits"].tobytes() == plain.tobytes()
    for layer in LAYERS:
        feeds[f"guard_text_{layer}"] *= np.float32(np.nan)
    again = lab.run(model, feeds)
    assert again["logits"].tobytes() == plain.tobytes()
    assert again["guard_heard_2"].tobytes() == got["guard_heard_2"].tobytes()


def test_a_float16_graph_hears_in_float32(lab: Any, guard: Any) -> None:
    spec, toy = guard("sequence", "replace", edits=(0,), sensor=FFN), lab.toy(dtype=HALF)
    feeds = told(lab, dtype=np.float16)
    feeds["guard_text_0"] = feeds["guard_text_1"]
    model = lab.insert(toy, spec)
    y = next(v for n in model.graph for v in n.outputs if v.name == FFN.onnx_value)
    model.graph.outputs.append(y)
    got = lab.run(model, feeds)
    z = law.coordinates(got[y.name].astype(np.float32), spec.edits[0].branches[0])
    assert got["guard_heard_0"].dtype == np.float32
    last = [np.flatnonzero(row)[-1] for row in feeds["attention_mask"]]
    # onnxruntime hands on y as it was before the rounding to float16: sixteen times half a unit in
    # the last place of values below 4
    assert np.abs(got["guard_heard_0"] - z[np.arange(5), last]).max() < 16 * 2**-10


# ---- verifying


def node(model: ir.Model, end: str) -> ir.Node:
    return next(n for n in model.graph if str(n.name).endswith(end))


def preset(model: ir.Model) -> None:
    value = next(v for v in model.graph.inputs if v.name == "guard_text_1")
    value.const_value = ir.tensor(np.zeros((1, 3), np.float32), name=value.name)
    model.graph.register_initializer(value)


def computed(model: ir.Model) -> None:
    """The text is what was heard in the same call: nothing is ever replaced at the last token."""
    edit = node(model, "layers.2.ffn_output/" + tag(model) + "/edit")
    edit.replace_input_with(
        2, node(model, "layers.1.ffn_output/" + tag(model) + "/edit").outputs[1]
    )


def crossed(model: ir.Model) -> None:
    edit = node(model, "layers.2.ffn_output/" + tag(model) + "/edit")
    edit.replace_input_with(2, next(v for v in model.graph.inputs if v.name == "guard_text_1"))


def other_token(model: ir.Model) -> None:
    """What is heard is not the last token's: the gate's answer is as large."""
    edit = node(model, "layers.2.ffn_output/" + tag(model) + "/edit")
    edit.replace_input_with(3, edit.inputs[1])


def hidden(model: ir.Model) -> None:
    heard = next(v for v in model.graph.outputs if v.name == "guard_heard_2")
    model.graph.outputs.remove(heard)


def feigned(model: ir.Model) -> None:
    place = next(i for i, v in enumerate(model.graph.outputs) if v.name == "guard_heard_2")
    real = model.graph.outputs[place]
    fake = ir.node("Neg", [real], name="fake")
    fake.outputs[0].dtype, fake.outputs[0].shape = real.dtype, real.shape
    real.name, fake.outputs[0].name = "real", "guard_heard_2"
    model.graph.append(fake)
    model.graph.outputs[place] = fake.outputs[0]


def weaker(model: ir.Model) -> None:
    end = "layers.2.ffn_output/" + tag(model) + "/strength"
    value = next(v for k, v in model.graph.initializers.items() if k.endswith(end))
    value.const_value = ir.tensor(np.array([0.9], np.float32), name=value.name)


def tag(model: ir.Model) -> str:
    return model.metadata_props["guardbake.guard"][:12]


FAULTS: dict[str, Callable[[ir.Model], None]] = {
    "text preset": preset,
    "text computed": computed,
    "text of another site": crossed,
    "another token": other_token,
    "what is heard is hidden": hidden,
    "what is heard is feigned": feigned,
    "alpha x 0.9": weaker,
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_refused(lab: Any, guard: Any, name: str) -> None:
    spec, toy = guard("sequence", "replace", edits=LAYERS), lab.toy()
    InsertGuard(spec)(toy.model)
    model = lab.reloaded(toy.model)
    VerifyGuard(spec, "the toy")(model)
    FAULTS[name](model)
    with pytest.raises(IntegrityError, match="do not ship"):
        VerifyGuard(spec, "the toy")(lab.reloaded(model))
