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
from guardbake.site import Site
from guardbake.spec import Branch, GuardSpec

from tests.passes.conftest import FP32, agree, feeds_for

KINDS = ("care", "care parallel", "care sequential", "project", "add", "steer", "astra")
FUSIONS = ("adaptive", "parallel", "sequential")
PROFILES = ("always", "token", "sequence")

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
