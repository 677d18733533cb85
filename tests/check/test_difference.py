"""Two guards compared: facts by name, subspaces by angle, vectors by cosine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from guardbake.check.difference import ABSENT, changes, facts_of, movements
from guardbake.spec import Branch, GuardSpec

Build = Callable[..., GuardSpec]


def with_basis(spec: GuardSpec, change: Callable[[np.ndarray], np.ndarray]) -> GuardSpec:
    """The first branch of the first edit on another basis."""
    edit = spec.edits[0]
    first = edit.branches[0]
    moved = replace(first, basis=change(first.basis.astype(np.float64)).astype(np.float32))
    branches: tuple[Branch, ...] = (moved, *edit.branches[1:])
    return replace(spec, edits=(replace(edit, branches=branches), *spec.edits[1:]))


def changed(before: GuardSpec, after: GuardSpec) -> dict[str, tuple[object, object]]:
    found = changes(facts_of(before), facts_of(after))
    return {each.what: (each.before, each.after) for each in found}


def test_a_guard_is_like_itself(guard: Build) -> None:
    assert changed(guard(), guard()) == {}
    assert movements(guard(), guard()) == []


def test_facts_that_change_are_named(guard: Build) -> None:
    before = guard("sequence", "care")
    assert set(changed(before, replace(before, method="other"))) == {"guard", "method"}
    weaker = guard("sequence", "care", strength=0.9)
    found = changed(before, weaker)
    assert found.pop("guard") == (before.digest, weaker.digest)
    assert found == {
        f"edits layers.2.ffn_output branches {name} strength": (1.0, 0.9)
        for name in ("visual", "text")
    }
    assert movements(before, weaker) == []


def test_a_threshold_a_profile_and_a_rank(guard: Build) -> None:
    raised = changed(guard(threshold=0.1), guard(threshold=0.2))
    assert [pair for what, pair in raised.items() if "threshold" in what] == [(0.1, 0.2)]
    assert changed(guard("token"), guard("sequence"))["profile"] == ("token", "sequence")
    before = guard("sequence", "care")
    fewer = with_basis(before, lambda q: q[:, :2])
    assert changed(before, fewer)["layers.2.ffn_output.visual.basis rank"] == (3, 2)


def test_a_layer_more_is_there_on_one_side_alone(guard: Build) -> None:
    before, after = guard("token", "add", edits=(2,)), guard("token", "add", edits=(1, 2))
    found = changed(before, after)
    assert found["edits layers.1.ffn_output kind"] == (ABSENT, "add")
    assert changed(after, before)["edits layers.1.ffn_output kind"] == ("add", ABSENT)


@pytest.mark.parametrize("degrees", [0.0, 10.0, 90.0])
def test_a_subspace_turned_by_a_known_angle(guard: Build, degrees: float) -> None:
    """One direction of three leaves the span; the other two are only mixed."""
    before = guard("sequence", "care")
    angle = np.radians(degrees)

    def turn(basis: np.ndarray) -> np.ndarray:
        outside = np.linalg.svd(basis)[0][:, -1]
        basis = basis.copy()
        basis[:, 0] = np.cos(angle) * basis[:, 0] + np.sin(angle) * outside
        return basis @ np.linalg.qr(np.random.default_rng(0).standard_normal((3, 3)))[0]

    (moved,) = movements(before, with_basis(before, turn))
    assert moved.what == "layers.2.ffn_output.visual.basis"
    assert moved.degrees is not None
    # bases are stored in float32, where an angle below sqrt(2^-23) radians is not told from none
    np.testing.assert_allclose(moved.degrees, [0, 0, degrees], atol=np.degrees(2.0**-11.5))


def test_vectors_have_a_cosine_and_a_length(guard: Build) -> None:
    before = guard("sequence", "steer")
    edit = before.edits[0]
    assert edit.push is not None
    after = replace(before, edits=(replace(edit, push=np.float32(-1.1) * edit.push),))
    (push,) = movements(before, after)
    assert (push.what, push.degrees) == ("layers.2.ffn_output.push", None)
    np.testing.assert_allclose([*push.cosines, *push.lengths], [-1, 1.1], rtol=1e-6)
    silent = replace(edit, push=np.zeros_like(edit.push))
    (gone,) = movements(before, replace(before, edits=(silent,)))
    assert np.isnan(gone.cosines[0])
    assert gone.lengths == (0.0,)


def test_guards_of_models_of_different_width_have_no_angles(guard: Build) -> None:
    narrow, wide = guard(width=16), guard(width=24)
    assert changed(narrow, wide)["model width"] == (16, 24)
    assert movements(narrow, wide) == []
