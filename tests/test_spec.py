"""A spec is checked when it is made, and its digest tells any two guards apart."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from guardbake.errors import MalformedError
from guardbake.site import Site, site_from_str
from guardbake.spec import (
    Branch,
    Edit,
    GuardSpec,
    ModelIdentity,
    Reading,
    Sensor,
    header,
    linear_sensor,
    tensors,
)

Build = Callable[..., GuardSpec]
F32 = np.float32
KINDS = ("care", "care parallel", "care sequential", "project", "add", "steer", "astra")


def unit(width: int = 4) -> np.ndarray:
    return np.eye(width, dtype=F32)[0]


def columns(width: int = 4, rank: int = 2) -> np.ndarray:
    return np.eye(width, dtype=F32)[:, :rank]


def zeros(width: int = 4) -> np.ndarray:
    return np.zeros(width, F32)


# ---- sites


@pytest.mark.parametrize("site", [Site(0, "ffn_output"), Site(22, "residual")])
def test_a_site_is_read_back_from_its_spelling(site: Site) -> None:
    assert site_from_str(str(site)) == site


@pytest.mark.parametrize(
    "text",
    ["", "layers.1", "layers.-1.residual", "layers.01.residual", "layers.1.residual ", "layers.1.x",
     "layers.\u0661.residual", "layers.1.residual\n", "layers." + "9" * 5000 + ".residual"],
)  # fmt: skip
def test_any_other_spelling_of_a_site_is_refused(text: str) -> None:
    with pytest.raises(MalformedError):
        site_from_str(text)


def test_depth_is_the_order_of_the_data() -> None:
    sites = [Site(layer, b) for layer in range(3) for b in ("ffn_output", "residual")]
    assert [site.depth for site in sites] == sorted({site.depth for site in sites})


# ---- what is refused


def branch(**changes: Any) -> Branch:
    values: dict[str, Any] = {
        "modality": "text", "basis": columns(), "centre": zeros(), "strength": 1.0, **changes
    }  # fmt: skip
    return Branch(**values)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"modality": "audio"}, "audio"),
        ({"basis": columns().astype(np.float64)}, "dtype float64"),
        ({"basis": columns()[:, 0]}, "shape"),
        ({"basis": columns()[:, :0]}, "1 to d columns"),
        ({"basis": np.ones((2, 3), F32)}, "1 to d columns"),
        ({"basis": columns() * F32(1.01)}, "Q\\^T Q"),
        ({"basis": np.ones((4, 2), F32) / 2}, "Q\\^T Q"),
        ({"basis": columns() * F32(np.nan)}, "not finite"),
        ({"centre": zeros(3)}, "shape"),
        ({"centre": zeros() + F32(np.inf)}, "not finite"),
        ({"gains": zeros(3)}, "shape"),
        ({"gains": np.ones(2)}, "float32"),
        ({"gains": zeros(2) * F32(np.nan)}, "not finite"),
        ({"strength": np.nan}, "finite"),
        ({"strength": np.inf}, "finite"),
    ],
)
def test_a_branch_is_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(MalformedError, match=says):
        branch(**changes)


@pytest.mark.parametrize(
    ("direction", "centre", "threshold", "says"),
    [
        (zeros(), zeros(), 0.0, "reads nothing"),
        (unit().astype(np.float16), zeros(), 0.0, "float32"),
        (unit(), zeros(5), 0.0, "shape"),
        (unit(), zeros(), np.nan, "finite"),
        (unit(), zeros(), np.inf, "finite"),
    ],
)
def test_a_sensor_is_refused(
    direction: np.ndarray, centre: np.ndarray, threshold: float, says: str
) -> None:
    with pytest.raises(MalformedError, match=says):
        linear_sensor(Site(0, "residual"), direction, centre, threshold)


def alike(count: int) -> np.ndarray:
    return np.stack([unit()] * count, axis=1)


@pytest.mark.parametrize(
    ("readings", "thresholds", "says"),
    [
        ((), (0.0,), "readings"),
        ((Reading(Site(0, "residual"), alike(1), zeros()),), (0.0, 0.0), "thresholds"),
        ((Reading(Site(0, "residual"), alike(2), zeros()),), (0.0, 0.0), "thresholds"),
        ((Reading(Site(0, "residual"), alike(1), zeros()),), (), "thresholds"),
        ((Reading(Site(0, "residual"), alike(1), zeros()),) * 2, (0.0,), "distinct"),
    ],
)
def test_a_sensor_of_parts_that_do_not_fit_is_refused(
    readings: tuple[Reading, ...], thresholds: tuple[float, ...], says: str
) -> None:
    with pytest.raises(MalformedError, match=says):
        Sensor(readings, thresholds)


def test_readings_out_of_order_or_of_three_columns_are_refused() -> None:
    early, late = (Reading(Site(n, "residual"), alike(1), zeros()) for n in (0, 1))
    with pytest.raises(MalformedError, match="in order"):
        Sensor((late, early), (0.0,))
    with pytest.raises(MalformedError, match="3 columns"):
        Reading(Site(0, "residual"), alike(3), zeros())


@pytest.mark.parametrize("profile", ["token", "sequence"])
def test_a_pooling_sensor_needs_a_latch(guard: Build, profile: str) -> None:
    if profile == "sequence":
        assert guard(profile, pools=True).pools
        return
    with pytest.raises(MalformedError, match="pooling"):
        guard(profile, pools=True)


FFN = Site(1, "ffn_output")
VISUAL = branch(modality="visual")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((FFN, "remove", (branch(),)), "kind"),
        ((Site(1, "residual"), "project", (branch(),)), "boundary"),
        ((FFN, "project", ()), "branches"),
        ((FFN, "project", (branch(), branch())), "branches"),
        ((FFN, "care", (branch(),)), "branches"),
        ((FFN, "care", (branch(), VISUAL)), "visual, then text"),
        ((FFN, "steer", ()), "push"),
        ((FFN, "project", (branch(),), zeros()), "push"),
        ((FFN, "steer", (), np.zeros((4, 1), F32)), "shape"),
        ((FFN, "steer", (), zeros() * F32(np.nan)), "not finite"),
        ((FFN, "steer", (), zeros(), np.inf), "finite"),
        ((FFN, "add", (branch(),), None, 2.0), "strength"),
        ((FFN, "care", (VISUAL, branch()), None, 1.0, "sum"), "fusion"),
        ((FFN, "care", (VISUAL, branch()), None, 1.0, None), "fusion"),
        ((FFN, "project", (branch(),), None, 1.0, "parallel"), "for care only"),
        ((FFN, "steer", (), unit(), 1.0, "sequential"), "for care only"),
        ((FFN, "steer", (), unit(), 1.0, "adaptive", zeros()), "a reference for kind steer"),
        ((FFN, "care", (VISUAL, branch()), None, 1.0, "adaptive", zeros()), "a reference"),
        ((FFN, "replace", (branch(gains=np.ones(2, F32)),)), "gains"),
        ((FFN, "replace", (VISUAL, branch())), "branches"),
        ((FFN, "astra", (), unit()), "no reference"),
        ((FFN, "astra", (), None, 1.0, "adaptive", zeros()), "no push"),
        ((FFN, "astra", (), unit() * F32(1.01), 1.0, "adaptive", zeros()), "unit length"),
        ((FFN, "astra", (), unit(), 1.0, "adaptive", zeros(5)), "shape"),
        ((FFN, "astra", (), unit(), 1.0, "adaptive", zeros() + F32(np.inf)), "not finite"),
        ((FFN, "care", (VISUAL, branch(basis=columns(5), centre=zeros(5)))), "width"),
    ],
)
def test_an_edit_is_refused(arguments: tuple[Any, ...], says: str) -> None:
    with pytest.raises(MalformedError, match=says):
        Edit(*arguments)


@pytest.mark.parametrize(
    "values",
    [("llava", 0, 4, "0"), ("llava", 3, 0, "0"), ("llava", 3.0, 4, "0"), (None, 3, 4, "0"),
     ("llava", 3, float("inf"), "0"), ("llava", True, 4, "0"), ("llava", 3, 4, None)],
)  # fmt: skip
def test_a_model_identity_is_refused(values: tuple[Any, ...]) -> None:
    with pytest.raises(MalformedError):
        ModelIdentity(*values)


def edit(layer: int, width: int = 4, gate: int = 0) -> Edit:
    return Edit(Site(layer, "ffn_output"), "steer", (), zeros(width), gate=gate)


def sensor(site: Site, width: int = 4) -> Sensor:
    return linear_sensor(site, unit(width), zeros(width), 0.0)


def pooling(one: Sensor) -> Sensor:
    (reading,) = one.readings
    both = replace(reading, directions=np.repeat(reading.directions, 2, axis=1))
    return Sensor((both,), one.thresholds * 3)


SENSOR = sensor(Site(0, "residual"))
TWO, BOTH = (SENSOR, sensor(Site(1, "residual"))), (edit(1), edit(2, gate=1))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"profile": "batch"}, "profile"),
        ({"edits": ()}, "no edits"),
        ({"sensors": ()}, "without a sensor"),
        ({"profile": "always"}, "with a sensor"),
        ({"edits": (Edit(FFN, "replace", (branch(),)),)}, "profile sequence"),
        ({"edits": (edit(2), edit(1))}, "layer order"),
        ({"edits": (edit(1), edit(1))}, "layer order"),
        ({"edits": (edit(3),)}, "layers 0 to 2"),
        ({"edits": (edit(-1),)}, "layers 0 to 2"),
        ({"sensors": (sensor(Site(3, "residual")),), "edits": (edit(2),)}, "layers 0 to 2"),
        ({"sensors": (sensor(Site(1, "residual")),)}, "at or before"),
        ({"sensors": (sensor(Site(2, "ffn_output")),)}, "at or before"),
        ({"sensors": (sensor(Site(0, "residual"), 5),)}, "width"),
        ({"edits": (edit(1, 5),)}, "width"),
        ({"edits": (edit(1, gate=1),)}, "gates"),
        ({"sensors": TWO}, "gates"),
        ({"sensors": TWO, "edits": (edit(1, gate=1), edit(2))}, "at or before"),
        ({"sensors": TWO[::-1], "edits": BOTH}, "one after the other"),
        ({"sensors": (SENSOR, SENSOR), "edits": BOTH}, "one after the other"),
        ({"sensors": (SENSOR,) * 33}, "at most 32"),
        ({"sensors": (SENSOR, pooling(TWO[1])), "edits": BOTH, "profile": "sequence"}, "first"),
        ({"profile": "always", "sensors": (), "edits": (edit(1, gate=1),)}, "gates"),
        ({"model": ModelIdentity("llava", 3, 5, "0")}, "width"),
        ({"method": None}, "method"),
        ({"provenance": {"a": np.float32(1)}}, "JSON"),
        ({"provenance": {"a": float("nan")}}, "JSON"),
        ({"provenance": [1]}, "JSON"),
    ],
)
def test_a_guard_is_refused(changes: dict[str, Any], says: str) -> None:
    good: dict[str, Any] = {
        "model": ModelIdentity("llava", 3, 4, "0"), "method": "test", "profile": "token",
        "sensors": (SENSOR,), "edits": (edit(1),), "provenance": {},
    }  # fmt: skip
    GuardSpec(**good)
    with pytest.raises(MalformedError, match=says):
        GuardSpec(**{**good, **changes})


@pytest.mark.parametrize("gate", [-1, True, 0.0])
def test_a_gate_is_a_number_of_a_sensor(gate: Any) -> None:
    with pytest.raises(MalformedError, match="number of a sensor"):
        edit(1, gate=gate)


def test_a_gate_may_open_several_edits_and_read_behind_another_s() -> None:
    model = ModelIdentity("llava", 4, 4, "0")
    edits = (*BOTH, edit(3))
    spec = GuardSpec(model, "test", "sequence", TWO, edits)
    assert list(tensors(spec))[:3:2] == [
        "sensor.0.layers.0.residual.directions", "sensor.1.layers.1.residual.directions",
    ]  # fmt: skip
    other = replace(spec, edits=(*BOTH, edit(3, gate=1)))
    assert other.digest != spec.digest


def test_a_sensor_may_read_the_very_tensor_that_is_edited() -> None:
    model = ModelIdentity("llava", 3, 4, "0")
    GuardSpec(model, "test", "token", (sensor(FFN),), (edit(1),))


# ---- arrays


def test_arrays_are_copied_and_read_only() -> None:
    basis = np.asfortranarray(columns())
    made = branch(basis=basis)
    basis[0, 0] = 7
    assert made.basis[0, 0] == 1
    assert made.basis.flags["C_CONTIGUOUS"]
    with pytest.raises(ValueError, match="read-only"):
        made.basis[0, 0] = 7


def test_provenance_cannot_be_changed_from_outside(guard: Build) -> None:
    given = {"figures": {"auc": 0.9}}
    spec = replace(guard(), provenance=given)
    digest = spec.digest
    given["figures"]["auc"] = 0.1
    assert spec.digest == digest


# ---- digests


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_guard_has_the_same_digest(guard: Build, kind: str) -> None:
    assert guard("token", kind).digest == guard("token", kind).digest
    assert guard("token", kind).digest != guard("token", kind, seed=1).digest


def moved(old: Sensor, site: Site) -> Sensor:
    return replace(old, readings=(replace(old.readings[0], site=site),))


def with_reading(old: Sensor, site: Site) -> Sensor:
    """One reading more."""
    return replace(old, readings=(*old.readings, replace(old.readings[0], site=site)))


def sensed_by(spec: GuardSpec, *sensors: Sensor) -> GuardSpec:
    return replace(spec, sensors=sensors)


def variants(spec: GuardSpec) -> dict[str, GuardSpec]:
    """The spec with each of its fields changed once."""
    first = spec.edits[0]
    (sensor,) = spec.sensors
    out = {
        "method": replace(spec, method="other"),
        "profile": replace(spec, profile="token"),
        "provenance": replace(spec, provenance={"n": 4}),
        "threshold": sensed_by(spec, replace(sensor, thresholds=(0.2,))),
        "sensor site": sensed_by(spec, moved(sensor, Site(1, "residual"))),
        "sensor boundary": sensed_by(spec, moved(sensor, Site(0, "ffn_output"))),
        "two readings": sensed_by(spec, with_reading(sensor, Site(1, "residual"))),
        "edit site": replace(spec, edits=(replace(first, site=Site(1, "ffn_output")),)),
        "one edit more": replace(spec, edits=(replace(first, site=Site(1, "ffn_output")), first)),
    }
    for name, value in (("family", "qwen"), ("layers", 4), ("digest", "1" * 64)):
        out[f"model {name}"] = replace(spec, model=replace(spec.model, **{name: value}))
    for index, old in enumerate(first.branches):
        ones = np.ones(old.basis.shape[1], F32)
        for name, new in (("strength", {"strength": 0.5}), ("gains", {"gains": ones})):
            some = list(first.branches)
            some[index] = replace(old, **new)
            out[f"{name} {index}"] = replace(spec, edits=(replace(first, branches=tuple(some)),))
    if first.kind == "care":
        for fusion in sorted({"adaptive", "parallel", "sequential"} - {first.fusion}):
            out[f"fusion {fusion}"] = replace(spec, edits=(replace(first, fusion=fusion),))
    if first.kind == "steer":
        push = first.push / np.linalg.norm(first.push)
        steer = replace(first, push=push)
        out["push"] = replace(spec, edits=(steer,))
        astra = replace(steer, kind="astra", reference=push)
        out["kind and reference"] = replace(spec, edits=(astra,))
    if first.push is not None:
        out["strength"] = replace(spec, edits=(replace(first, strength=0.5),))
    if first.kind in ("project", "add"):
        other = "add" if first.kind == "project" else "replace"
        out["kind"] = replace(spec, edits=(replace(first, kind=other),))
    return out


@pytest.mark.parametrize("kind", KINDS)
def test_every_field_is_in_the_digest(guard: Build, kind: str) -> None:
    spec = guard("sequence", kind)
    digests = {"as it is": spec.digest, **{k: v.digest for k, v in variants(spec).items()}}
    assert len(set(digests.values())) == len(digests)


@pytest.mark.parametrize("gains", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_last_bit_of_every_array_is_in_the_digest(guard: Build, kind: str, gains: bool) -> None:
    """One float moved to its neighbour: every array, as the guard carries it."""
    spec = guard("sequence", kind, gains=gains)
    seen = {spec.digest}
    for name in tensors(spec):
        changed = guard("sequence", kind, gains=gains)
        array = tensors(changed)[name]
        array.setflags(write=True)
        array.flat[-1] = np.nextafter(array.flat[-1], F32(np.inf))
        seen.add(changed.digest)
    assert len(seen) == len(tensors(spec)) + 1


@pytest.mark.parametrize("gains", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_every_array_has_a_name_of_its_own(guard: Build, kind: str, gains: bool) -> None:
    spec = guard("sequence", kind, edits=(1, 2), gains=gains)
    branches = {"care": 2, "project": 1, "add": 1}.get(kind.split()[0], 0)
    per_edit = branches * (3 if gains else 2) + {"steer": 1, "astra": 2}.get(kind, 0)
    assert len(tensors(spec)) == 2 + 2 * per_edit
    assert header(spec)["edits"][1]["site"] == "layers.2.ffn_output"
