"""The guarded graph computes the law, in onnxruntime, after a trip through the file format."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guardbake import semantics as law
from guardbake.errors import SiteError, UnsupportedError
from guardbake.passes.edits import edit_function, edit_inputs
from guardbake.passes.insert import InsertGuard
from guardbake.site import Site
from guardbake.spec import Branch, GuardSpec

KINDS = ("care", "care parallel", "care sequential", "project", "add", "steer", "astra")
FUSIONS = ("adaptive", "parallel", "sequential")
PROFILES = ("always", "token", "sequence")
# Three layers of 16 products each on values up to about 10, in two orders of summation:
# 3 * 16 * 10 * 2**-24 = 3e-5 at worst.
FP32 = 3e-5


def feeds_for(lab: Any, spec: GuardSpec, **shape: Any) -> dict[str, Any]:
    feeds = dict(lab.feeds(**shape))
    if spec.profile != "sequence":
        del feeds["guard_state"]
    if spec.sensor is None or not spec.sensor.pools:
        del feeds["guard_memory"], feeds["guard_image_mask"]
    return feeds


def agree(got: dict[str, Any], expected: dict[str, Any]) -> None:
    assert sorted(got) == sorted(expected)
    for name in ("guard_open", "guard_state_out"):
        if name in expected:
            assert got[name].tolist() == expected[name].tolist()
    for name in {"logits", "guard_score", "guard_memory_out"} & set(expected):
        assert np.abs(got[name] - expected[name]).max() < FP32


SEVERAL = Site(0, "ffn_output"), Site(0, "residual"), Site(1, "residual")


@pytest.mark.parametrize("profile", ["token", "sequence"])
def test_a_sensor_of_several_sites_is_the_law_s(lab: Any, guard: Any, profile: str) -> None:
    spec, toy = guard(profile, "care", sensor=SEVERAL), lab.toy()
    feeds = feeds_for(lab, spec)
    expected = toy.law(spec, feeds)
    agree(lab.run(lab.insert(toy, spec), feeds), expected)
    assert 0 < expected["guard_open"].sum() < expected["guard_open"].size


@pytest.mark.parametrize("sites", [SEVERAL[1], SEVERAL])
def test_a_pooling_sensor_is_the_law_s(lab: Any, guard: Any, sites: Any) -> None:
    """Rows with a past: one remembered, one forgotten, one decided before."""
    spec, toy = guard("sequence", "steer", sensor=sites, pools=True), lab.toy()
    feeds = feeds_for(lab, spec)
    expected = toy.law(spec, feeds)
    assert (expected["guard_memory_out"][:, law.IMAGES] > 0).sum() > 0
    graph = lab.insert(toy, spec)
    agree(lab.run(graph, feeds), expected)
    past = np.ones((4, 3), np.int64)
    feeds["attention_mask"] = np.concatenate([past, feeds["attention_mask"]], axis=1)
    feeds["guard_state"] = np.array([0, -8, -6, law.CLOSED])
    feeds["guard_memory"] = np.array([[2, 1, 3], [0, 0, 0], [-4, 2, 3], [0, 0, 1]], np.float32)
    expected = toy.law(spec, feeds)
    assert expected["guard_state_out"].tolist()[1::2] == [law.OPEN, law.CLOSED]
    agree(lab.run(graph, feeds), expected)


@pytest.mark.parametrize("gains", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("profile", PROFILES)
def test_the_graph_computes_the_law(
    lab: Any, guard: Any, profile: str, kind: str, gains: bool
) -> None:
    spec, toy = guard(profile, kind, strength=0.7, gains=gains), lab.toy()
    feeds = feeds_for(lab, spec)
    expected = toy.law(spec, feeds)
    agree(lab.run(lab.insert(toy, spec), feeds), expected)
    if profile != "always":  # the case shows both sides of the gate
        assert 0 < expected["guard_open"].sum() < expected["guard_open"].size


def test_a_prompt_whose_end_was_missed_opens_in_the_graph(lab: Any, guard: Any) -> None:
    """Tokens fed before, in the mask alone: ends missed, in this call, and still to come."""
    feeds = dict(lab.feeds())
    cached = np.ones((4, 4), np.int64)
    feeds["attention_mask"] = np.concatenate([cached, feeds["attention_mask"]], axis=1)
    feeds["guard_state"] = np.array([-3, -6, -4, -20], np.int64)
    spec, toy = guard("sequence", "care"), lab.toy()
    expected = toy.law(spec, feeds)
    assert expected["guard_state_out"].tolist()[::2] == [2, 2]
    agree(lab.run(lab.insert(toy, spec), feeds), expected)


@pytest.mark.parametrize("profile", PROFILES)
def test_several_edits_each_at_its_own_layer(lab: Any, guard: Any, profile: str) -> None:
    spec, toy = guard(profile, "care", edits=(1, 2)), lab.toy()
    feeds = feeds_for(lab, spec)
    expected = toy.law(spec, feeds)
    alone = lab.toy().law(guard(profile, "care", edits=(1,)), feeds)
    assert np.abs(expected["logits"] - alone["logits"]).max() > 0.1
    agree(lab.run(lab.insert(toy, spec), feeds), expected)


@pytest.mark.parametrize(
    "sensor", [Site(0, "ffn_output"), Site(1, "residual"), Site(2, "ffn_output")]
)
@pytest.mark.parametrize("profile", ["token", "sequence"])
def test_the_sensor_reads_its_site_before_any_edit(
    lab: Any, guard: Any, profile: str, sensor: Site
) -> None:
    spec, toy = guard(profile, "project", sensor=sensor), lab.toy()
    feeds = feeds_for(lab, spec)
    agree(lab.run(lab.insert(toy, spec), feeds), toy.law(spec, feeds))


@pytest.mark.parametrize("alpha", [0.0, -1.0, 4.5])
@pytest.mark.parametrize("kind", KINDS)
def test_any_strength_is_rendered(lab: Any, guard: Any, kind: str, alpha: float) -> None:
    spec, toy = guard("token", kind, strength=alpha), lab.toy()
    feeds = feeds_for(lab, spec)
    agree(lab.run(lab.insert(toy, spec), feeds), toy.law(spec, feeds))


def with_branches(spec: GuardSpec, *branches: Branch) -> GuardSpec:
    return replace(spec, edits=(replace(spec.edits[0], branches=branches),))


@pytest.mark.parametrize("fusion", FUSIONS)
def test_a_branch_that_adds_weighs_by_its_size(lab: Any, guard: Any, fusion: str) -> None:
    """Strengths of two signs: a size is a length and stays positive."""
    spec, toy = guard("always", f"care {fusion}", gains=True), lab.toy()
    visual, text = spec.edits[0].branches
    spec = with_branches(spec, visual, replace(text, strength=-0.5))
    feeds = feeds_for(lab, spec)
    agree(lab.run(lab.insert(toy, spec), feeds), toy.law(spec, feeds))


def wrong(spec: GuardSpec) -> dict[str, GuardSpec]:
    """The guard as a careless rendering would compute it, by what was done wrong."""
    edit = spec.edits[0]
    others = sorted(set(FUSIONS) - {edit.fusion}) if edit.kind == "care" else []
    out = {f: replace(spec, edits=(replace(edit, fusion=f),)) for f in others}
    if edit.reference is not None:
        for name in ("reference", "push"):
            turned = replace(edit, **{name: -getattr(edit, name)})
            out[f"{name} flipped"] = replace(spec, edits=(turned,))
    if len(edit.branches) == 2:
        first, second = (replace(b, modality="text") for b in edit.branches)
        out["branches swapped"] = with_branches(spec, replace(second, modality="visual"), first)
    for index, branch in enumerate(edit.branches):
        some = list(edit.branches)
        for name, change in {
            "gains x 1.01": {"gains": branch.gains * np.float32(1.01)},
            "no gains": {"gains": None},
            "alpha x 0.9": {"strength": branch.strength * 0.9},
        }.items():
            some[index] = replace(branch, **change)
            out[f"{name} {index}"] = with_branches(spec, *some)
    return out


@pytest.mark.parametrize("kind", KINDS)
def test_parity_tells_a_wrong_rendering(lab: Any, guard: Any, kind: str) -> None:
    """What the budget of these tests would miss: one part in a hundred of one branch's gains."""
    spec, toy = guard("always", kind, gains=True), lab.toy()
    feeds = feeds_for(lab, spec)
    right = toy.law(spec, feeds)["logits"]
    for name, other in wrong(spec).items():
        got = lab.run(lab.insert(lab.toy(), other), feeds)["logits"]
        gap = np.abs(got - right).max()
        if name == "branches swapped" and not kind.endswith("sequential"):
            assert gap < FP32  # only in a sequence does one of them come first
        else:
            assert gap > 100 * FP32, name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("profile", ["token", "sequence"])
def test_closed_is_the_unguarded_graph_bit_for_bit(
    lab: Any, guard: Any, profile: str, kind: str
) -> None:
    """Also where the edited branch overflows: 1e36 pushed by a strength of 1e4."""
    spec, toy = guard(profile, kind, threshold=3e38, strength=1e4), lab.toy()
    feeds = feeds_for(lab, spec)
    feeds["inputs_embeds"][0, 0] *= 1e36
    if profile == "sequence":
        feeds["guard_state"][:] = 0
    plain = lab.run(toy.model, feeds)["logits"]
    assert np.isfinite(plain).all()
    got = lab.run(lab.insert(toy, spec), feeds)
    assert not got["guard_open"].any()
    assert got["logits"].tobytes() == plain.tobytes()


def test_a_score_that_is_not_a_number_opens(lab: Any, guard: Any) -> None:
    spec, toy = guard("token", "steer", threshold=3e38), lab.toy()
    feeds = feeds_for(lab, spec)
    feeds["inputs_embeds"][0, 1, 0] = np.nan
    got = lab.run(lab.insert(toy, spec), feeds)
    assert np.argwhere(got["guard_open"]).tolist() == [[0, 1]]


@given(st.integers(0, 2**16), st.integers(1, 3), st.lists(st.integers(1, 5), max_size=4))
@settings(max_examples=25)
def test_chunks_agree_with_the_whole(
    lab: Any, guard: Any, seed: int, batch: int, cuts: list[int]
) -> None:
    """This decoder has no attention, so chunks differ from the whole in the gate alone."""
    spec, toy = guard("sequence", "steer"), lab.toy()
    session = ort.InferenceSession(ir.to_proto(lab.insert(toy, spec)).SerializeToString())
    rng = np.random.default_rng(seed)
    left = rng.integers(0, 3, batch)
    mask = (np.arange(6) >= left[:, None]).astype(np.int64)
    x = rng.standard_normal((batch, 6, lab.width)).astype(np.float32)
    prompts = rng.integers(1, 7 - left)
    state, parts = -prompts.astype(np.int64), []
    expected, state_expected = law.gate_by_sequence(
        toy.law(spec, {"inputs_embeds": x, "attention_mask": mask, "guard_state": state})[
            "guard_score"
        ],
        mask,
        state,
    )
    stops = sorted({*cuts, 6})
    for start, stop in zip([0, *stops[:-1]], stops, strict=True):
        feeds = {
            "inputs_embeds": x[:, start:stop],
            "attention_mask": mask[:, :stop],
            "guard_state": state,
        }
        opened, state = session.run(["guard_open", "guard_state_out"], feeds)
        parts.append(opened)
    assert np.concatenate(parts, axis=1).tolist() == expected.tolist()
    assert state.tolist() == state_expected.tolist()


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
    if spec.sensor is not None:
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
    assert len(report.nodes) == 5
    assert [str(found.site) for found in report.found] == [
        "layers.0.residual", "layers.1.ffn_output", "layers.2.ffn_output",
    ]  # fmt: skip
    assert [v.name for v in toy.model.graph.inputs] == [
        "inputs_embeds", "attention_mask", "guard_state",
    ]  # fmt: skip
    assert [v.name for v in toy.model.graph.outputs] == [
        "logits", "guard_score", "guard_state_out", "guard_open",
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
    thresholds = found[f"guardbake/sensor/{spec.digest[:12]}/thresholds"]
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
