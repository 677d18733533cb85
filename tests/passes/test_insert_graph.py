"""What a guarded graph looks like, what it computes in float16, and what is refused unchanged."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from guardbake import semantics as law
from guardbake.errors import SiteError, UnsupportedError
from guardbake.passes.edits import edit_function, edit_inputs
from guardbake.passes.insert import InsertGuard
from guardbake.site import Site
from guardbake.spec import GuardSpec

from tests.passes.conftest import FP32, agree, feeds_for

KINDS = ("care", "care parallel", "care sequential", "project", "add", "steer", "astra")
PROFILES = ("always", "token", "sequence")


# ---- float16


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("profile", PROFILES)
def test_a_float16_graph_is_edited_in_float32(
    lab: Any, guard: Any, profile: str, kind: str
) -> None:
    site = Site(0, "ffn_output")
    spec = guard(profile, kind, edits=(0,), sensor=site)
    toy = lab.toy(dtype=ir.DataType.FLOAT16)
    feeds = feeds_for(lab, spec, dtype=np.float16)
    model = lab.insert(toy, spec)
    edited = value_named(model, "/edited")
    assert edited.dtype == ir.DataType.FLOAT16
    y = value_named(model, site.onnx_value)
    model.graph.outputs.extend([edited, y])
    got = lab.run(model, feeds)
    exact = got[y.name].astype(np.float32)  # what this very graph computed, edited by the law
    expected = law.edited(exact, spec.edits[0])
    if spec.sensors:
        expected = law.gated(exact, expected, got["guard_open"])
    # one rounding to float16 at the end, half a unit in the last place of values below 16
    assert np.abs(got[edited.name].astype(np.float32) - expected).max() <= 2**-8 + FP32
    assert np.abs(expected - exact).max() > 0.1


def value_named(model: ir.Model, end: str) -> ir.Value:
    return next(v for n in model.graph for v in n.outputs if str(v.name).endswith(end))


@pytest.mark.parametrize("kind", KINDS)
def test_one_product_in_and_one_out(guard: Any, kind: str) -> None:
    """Whatever the number of branches: two products, in a sequence a third one over the ranks."""
    edit = guard("always", kind).edits[0]
    body = edit_function("f", edit, ir.DataType.FLOAT, False, 23)
    products = [n for n in body if n.op_type == "MatMul"]
    assert len(products) == {"steer": 0, "astra": 1, "care sequential": 3}.get(kind, 2)
    shapes = {array.shape for array in edit_inputs(edit).values()}
    assert shapes <= {(16, 5), (16, 3), (16,), (5, 5), (5,), (3,), (1,)}  # never width by width


def test_a_float16_graph_saturates_and_stays_finite(lab: Any, guard: Any) -> None:
    """A push past 65504 ends at the largest finite float16 on both sides, not at infinity."""
    spec = guard("always", "steer", edits=(2,), strength=1e6)
    toy = lab.toy(dtype=ir.DataType.FLOAT16)
    feeds = feeds_for(lab, spec, dtype=np.float16)
    model = lab.insert(toy, spec)
    edited = value_named(model, "/edited")
    model.graph.outputs.append(edited)
    got = lab.run(model, feeds)[edited.name]
    assert np.isfinite(got).all()
    assert np.abs(got).max() == 65504
    assert {-65504.0, 65504.0} <= set(got.astype(np.float64).ravel())


# ---- what the graph looks like


def test_what_is_added_and_nothing_else(lab: Any, guard: Any) -> None:
    spec, toy = guard("sequence", "care", edits=(1, 2)), lab.toy()
    before = {node.name for node in toy.model.graph}
    report = InsertGuard(spec)(toy.model)
    after = [node.name for node in toy.model.graph]
    assert set(after) - before == set(report.nodes)
    assert len(after) == len(set(after))
    assert len(report.nodes) == 6
    assert [str(found.site) for found in report.found] == [
        "layers.0.residual", "layers.1.ffn_output", "layers.2.ffn_output",
    ]  # fmt: skip
    assert [v.name for v in toy.model.graph.inputs] == [
        "inputs_embeds", "attention_mask", "guard_state",
    ]  # fmt: skip
    assert [v.name for v in toy.model.graph.outputs] == [
        "logits", "guard_score", "guard_open", "guard_state_out",
    ]  # fmt: skip
    assert toy.model.metadata_props["guardbake.guard"] == spec.digest


@pytest.mark.parametrize(("profile", "new"), [("always", set()), ("token", {"score", "open"})])
def test_other_profiles_take_no_new_input(
    lab: Any, guard: Any, profile: str, new: set[str]
) -> None:
    spec, toy = guard(profile, "add"), lab.toy()
    InsertGuard(spec)(toy.model)
    assert [v.name for v in toy.model.graph.inputs] == ["inputs_embeds", "attention_mask"]
    outputs = {str(v.name) for v in toy.model.graph.outputs}
    assert outputs == {"logits"} | {f"guard_{name}" for name in new}


def test_the_arrays_are_initialisers_with_the_pack_s_bytes(lab: Any, guard: Any) -> None:
    spec = guard("token", "project")
    model = lab.insert(lab.toy(), spec)
    found = {name: v.const_value.numpy() for name, v in model.graph.initializers.items()}
    base = f"guardbake/layers.2.ffn_output/{spec.digest[:12]}"
    assert found[f"{base}/basis"].tobytes() == spec.edits[0].branches[0].basis.tobytes()
    thresholds = found[f"guardbake/sensor.0/{spec.digest[:12]}/thresholds"]
    assert thresholds.tolist() == [np.float32(0.1)]


def test_the_same_graph_and_guard_give_the_same_bytes(lab: Any, guard: Any) -> None:
    made = {
        ir.to_proto(lab.insert(lab.toy(), guard("sequence", "care"))).SerializeToString(
            deterministic=True
        )
        for _ in range(3)
    }
    assert len(made) == 1


def test_a_site_that_is_a_graph_output_is_handed_on_edited(lab: Any, guard: Any) -> None:
    toy = lab.toy()
    y = toy.value(2)
    toy.model.graph.outputs.append(y)
    InsertGuard(guard("always", "add"))(toy.model)
    assert not any(output is y for output in toy.model.graph.outputs)
    assert str(toy.model.graph.outputs[1].name).endswith("/edited")


# ---- refusals leave the graph alone


def refused(toy: Any, spec: GuardSpec, error: type[Exception], says: str) -> None:
    before = ir.to_proto(toy.model).SerializeToString(deterministic=True)
    with pytest.raises(error, match=says):
        InsertGuard(spec)(toy.model)
    assert ir.to_proto(toy.model).SerializeToString(deterministic=True) == before


def test_a_guarded_graph_is_refused(lab: Any, guard: Any) -> None:
    toy = lab.toy()
    InsertGuard(guard("token", "add"))(toy.model)
    refused(toy, guard("token", "add"), UnsupportedError, "unguarded export")
    refused(toy, guard("always", "steer"), UnsupportedError, "unguarded export")


@pytest.mark.parametrize("profile", ["token", "sequence"])
def test_a_gate_needs_an_attention_mask(lab: Any, guard: Any, profile: str) -> None:
    refused(lab.toy(mask=False), guard(profile, "add"), SiteError, "attention_mask")


def test_the_profile_always_needs_none(lab: Any, guard: Any) -> None:
    spec, toy = guard("always", "add"), lab.toy(mask=False)
    feeds = {"inputs_embeds": lab.feeds()["inputs_embeds"]}
    agree(lab.run(lab.insert(toy, spec), feeds), toy.law(spec, feeds))


@pytest.mark.parametrize("opset", [17, 13])
def test_an_old_opset_is_refused(lab: Any, guard: Any, opset: int) -> None:
    refused(lab.toy(opset=opset), guard(), UnsupportedError, f"opset {opset}")


@pytest.mark.parametrize("opset", [18, 20, 21, 22])
def test_every_later_opset_is_served(lab: Any, guard: Any, opset: int) -> None:
    spec, toy = guard("sequence", "care"), lab.toy(opset=opset)
    feeds = feeds_for(lab, spec)
    agree(lab.run(lab.insert(toy, spec), feeds), toy.law(spec, feeds))


@pytest.mark.parametrize("dtype", [None, ir.TensorType(ir.DataType.INT8)])
def test_a_site_without_a_float_dtype_is_refused(lab: Any, guard: Any, dtype: Any) -> None:
    toy = lab.toy()
    toy.value(2).type = dtype
    refused(toy, guard("token", "add"), SiteError, "float dtype")


def test_a_missing_site_is_refused(lab: Any, guard: Any) -> None:
    refused(lab.toy(), guard(layers=9, edits=(7,)), SiteError, "no match")
