"""A whole guard passes; each way of breaking or going round it that we know is refused."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import pytest

from guardbake.errors import IntegrityError
from guardbake.passes.insert import InsertGuard
from guardbake.passes.verify import VerifyGuard
from guardbake.site import Site
from guardbake.spec import GuardSpec

from tests.passes.verify_faults import FAULTS, drop, tag

KINDS = ("care", "care parallel", "care sequential", "project", "add", "steer", "astra")
PROFILES = ("always", "token", "sequence")


def verify(spec: GuardSpec, model: ir.Model) -> None:
    VerifyGuard(spec, "the toy")(model)


def test_a_whole_guard_passes(lab: Any, guard: Any) -> None:
    for profile in PROFILES:
        for kind in KINDS:
            spec = guard(profile, kind, edits=(1, 2))
            report = VerifyGuard(spec, "the toy")(lab.insert(lab.toy(), spec))
            assert len(report.nodes) == (2 if profile == "always" else 6)


@pytest.mark.parametrize("sensor", [Site(0, "ffn_output"), Site(2, "ffn_output")])
def test_a_sensor_on_an_ffn_output_passes(lab: Any, guard: Any, sensor: Site) -> None:
    spec = guard("token", "add", sensor=sensor)
    verify(spec, lab.insert(lab.toy(), spec))


def test_graphs_of_other_kinds_pass(lab: Any, guard: Any) -> None:
    spec = guard("sequence", "care")
    toys = (
        lab.toy(dtype=ir.DataType.FLOAT16),
        lab.toy(bias=True),
        lab.toy(lambda layer: f"n{layer}", scopes=True),
        lab.toy(lambda layer: f"/lm/layers.{layer}/mlp/down_proj/MatMul"),
        lab.toy(opset=18),
    )
    for toy in toys:
        verify(spec, lab.insert(toy, spec))


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_refused(lab: Any, guard: Any, name: str) -> None:
    spec = guard("sequence", "care")
    model = lab.insert(lab.toy(), spec)
    verify(spec, model)
    FAULTS[name](model)
    model = lab.reloaded(model)
    with pytest.raises(IntegrityError, match="do not ship") as caught:
        verify(spec, model)
    assert caught.value.where == "the toy"


def test_an_unguarded_graph_is_refused(lab: Any, guard: Any) -> None:
    with pytest.raises(IntegrityError, match="guard none"):
        verify(guard(), lab.toy().model)


@pytest.mark.parametrize(("made", "asked"), [("always", "token"), ("token", "sequence")])
def test_another_profile_is_another_guard(lab: Any, guard: Any, made: str, asked: str) -> None:
    model = lab.insert(lab.toy(), guard(made, "add"))
    with pytest.raises(IntegrityError):
        verify(guard(asked, "add"), model)


def test_the_digest_alone_is_not_believed(lab: Any, guard: Any) -> None:
    """A guard of other numbers that claims to be the one asked for."""
    spec = guard("token", "project")
    model = lab.insert(lab.toy(), guard("token", "project", seed=1))
    model.metadata_props["guardbake.guard"] = spec.digest
    with pytest.raises(IntegrityError):
        verify(spec, model)


@pytest.mark.parametrize("profile", PROFILES)
def test_a_missing_edit_of_several_is_refused(lab: Any, guard: Any, profile: str) -> None:
    spec = guard(profile, "steer", edits=(1, 2))
    model = lab.insert(lab.toy(), spec)
    drop("layers.1.ffn_output/" + tag(model) + "/edit")(model)
    with pytest.raises(IntegrityError, match="guard nodes"):
        verify(spec, model)


def test_verifying_leaves_the_graph_as_it_was(lab: Any, guard: Any) -> None:
    spec, toy = guard("sequence", "care"), lab.toy()
    InsertGuard(spec)(toy.model)
    before = ir.to_proto(toy.model).SerializeToString(deterministic=True)
    verify(spec, toy.model)
    assert ir.to_proto(toy.model).SerializeToString(deterministic=True) == before
