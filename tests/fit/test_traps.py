"""The traps of METHODS, planted: each is caught, and by the error that says so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import scipy.linalg
from safetensors import safe_open
from safetensors.numpy import save_file

from guardbake.activations import Activations, Turns
from guardbake.artifact import load_guard, save_guard
from guardbake.covariance import finite_rows
from guardbake.errors import MalformedError
from guardbake.fit.care import fit_care
from guardbake.fit.care_public import public_subspace
from guardbake.fit.contrasts import Contrasts
from guardbake.fit.push import mean_difference_push
from guardbake.fit.subspace import (
    discriminative_subspace,
    largest_angle,
    mean_difference,
    safety_directions,
)
from guardbake.fit.vlm_guard import safety_direction_edit
from guardbake.recipe import CandidateSection
from guardbake.site import Site
from guardbake.spec import Branch

Matrix = npt.NDArray[np.float64]
FFN = Site(1, "ffn_output")
CARE = CandidateSection(edit="care", layers=[1], strengths=[1.0], rank=2, ridge=0.1)


def planted(seed: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Harmful rows vary along the first axis as harmless ones do not; both vary 300 times as much
    along one direction of all the other axes, as an attention sink makes them."""
    rng = np.random.default_rng(seed)
    sink = np.r_[0, np.ones(47)] / np.sqrt(47)
    rows = rng.standard_normal((2, 2000, 48)) + 300 * rng.standard_normal((2, 2000, 1)) * sink
    rows[0, :, 0] *= 6
    return rows[0].astype(np.float32), rows[1].astype(np.float32)


# ---- float16


def published_top(moment: Matrix, covariance: Matrix) -> tuple[Matrix, bool]:
    """(top direction [d, 1], whether the square root is complex): the public recipe's steps."""
    root = scipy.linalg.sqrtm(covariance + 1e-6 * np.eye(len(covariance)))
    whitening = np.linalg.inv(np.real(root))
    values, vectors = np.linalg.eigh(whitening @ moment @ whitening.T)
    top = whitening.T @ vectors[:, [values.argmax()]]
    return top / np.linalg.norm(top), bool(np.abs(np.imag(root)).max() > 1e-3)


def test_a_covariance_in_float16_loses_the_subspace_and_ours_keeps_it() -> None:
    """Summed exactly and only stored in float16, which is the kindest case."""
    harmful, harmless = planted(0)
    axis = np.eye(48)[:, [0]]
    exact = [np.cov(rows, rowvar=False, bias=True, dtype=np.float64) for rows in planted(0)]
    stored = [c.astype(np.float16).astype(np.float64) for c in exact]
    assert np.linalg.eigvalsh(stored[1]).min() < -1  # no covariance any more
    kept, kept_complex = published_top(*exact)
    lost, lost_complex = published_top(*stored)
    assert (kept_complex, lost_complex) == (False, True)
    assert largest_angle(kept, axis) < 0.3
    assert largest_angle(lost, axis) > 0.6
    for subspace in (
        discriminative_subspace(harmful, harmless, 1, 1e-5),
        public_subspace(harmful, harmless, 1),
    ):
        assert largest_angle(subspace.basis, axis) < 0.3


@pytest.mark.parametrize("which", [0, 1])
def test_rows_in_float16_are_refused_by_every_method(which: int) -> None:
    pair = list(planted(0))
    pair[which] = pair[which].astype(np.float16)
    for fit in (
        lambda: discriminative_subspace(*pair, 2, 0.1),
        lambda: public_subspace(*pair, 2),
        lambda: safety_directions(*pair, 2),
        lambda: mean_difference(*pair),
    ):
        with pytest.raises(MalformedError, match="float16") as caught:
            fit()
        assert caught.value.exit_code == 9


def test_whatever_comes_in_is_solved_in_float64() -> None:
    for dtype in (np.float32, np.float64, np.int64):
        assert finite_rows(np.ones((3, 2), dtype), "here", 2).dtype == np.float64


# ---- wrong boundary


def test_a_pack_of_the_residual_is_refused(guard: Any, tmp_path: Path) -> None:
    """The edit's site renamed in the pack: its numbers are fine, and it would be 9 times weaker."""
    path = tmp_path / "guard.safetensors"
    save_guard(guard("always", "project", edits=(2,)), path)
    arrays = {}
    with safe_open(str(path), framework="np") as pack:
        meta = {
            key: value.replace("ffn_output", "residual") for key, value in pack.metadata().items()
        }
        for name in pack.keys():  # noqa: SIM118, no dictionary
            arrays[name.replace("ffn_output", "residual")] = pack.get_tensor(name)
    save_file(arrays, path, meta)
    with pytest.raises(MalformedError, match="ffn_output, the only edited boundary") as caught:
        load_guard(path)
    assert caught.value.exit_code == 9


def test_rows_of_the_residual_are_not_fitted_for_the_ffn_output(made: Any) -> None:
    acts = made.activations({})
    residual = {Site(1, "residual"): acts.last[Site(1, "residual")]}
    wrong = Activations(acts.samples, residual, residual, residual)
    contrasts = Contrasts(wrong, Turns(residual), Turns(residual))
    for fit in (
        lambda: fit_care(CARE, 1, contrasts),
        lambda: safety_direction_edit(wrong, 1, 1, "add"),
    ):
        with pytest.raises(MalformedError, match="the tensor that is edited") as caught:
            fit()
        assert caught.value.exit_code == 9


# ---- wrong sign


def test_a_singular_vector_is_turned_towards_harm_whatever_sign_it_came_with() -> None:
    harmful, harmless = planted(0)
    harmful[:, 0] += 30
    for order in (slice(None), slice(None, None, -1)):
        direction = safety_directions(harmful[order], harmless[order], 1).basis[:, 0]
        assert direction @ mean_difference(harmful, harmless) > 0


# ---- unorthonormal


def test_a_basis_that_is_not_orthonormal_is_refused() -> None:
    harmful, harmless = planted(0)
    basis = discriminative_subspace(harmful, harmless, 3, 0.1).basis
    public = public_subspace(harmful, harmless, 3)
    columns = public.basis @ np.diag(np.sqrt(public.gains)) @ np.linalg.qr(np.ones((3, 3)))[0]
    for wrong in (basis * 1.01, basis[:, [0, 0, 1]], columns):
        with pytest.raises(MalformedError, match=r"\|Q\^T Q - I\|") as caught:
            Branch("text", wrong.astype(np.float32), np.zeros(48, np.float32), 1.0)
        assert caught.value.exit_code == 9


# ---- bad rows


def contrasts_of(acts: Activations, turns: npt.NDArray[np.float32]) -> Contrasts:
    return Contrasts(acts, Turns({FFN: turns}), Turns({FFN: turns[::-1] * 2}))


def test_fewer_than_two_classes(made: Any) -> None:
    acts = made.activations({})
    turns = np.random.default_rng(0).standard_normal((40, made.width)).astype(np.float32)
    for label in ("harmful", "harmless"):
        keep = np.flatnonzero(acts.where(lambda s, one=label: s.label == one))
        one = Activations(
            [acts.samples[i] for i in keep],
            {site: rows[keep] for site, rows in acts.last.items()},
            {site: rows[keep] for site, rows in acts.image_mean.items()},
        )
        for fit in (
            lambda one=one: fit_care(CARE, 1, contrasts_of(one, turns)),
            lambda one=one: safety_direction_edit(one, 1, 1, "add"),
            lambda one=one: mean_difference_push(one, 1),
        ):
            with pytest.raises(MalformedError) as caught:
                fit()
            assert caught.value.exit_code == 9


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_activations_that_are_not_finite(made: Any, bad: float) -> None:
    acts = made.activations({})
    turns = np.random.default_rng(0).standard_normal((40, made.width)).astype(np.float32)
    spoilt = turns.copy()
    spoilt[3, 3] = bad
    rows = {site: some.copy() for site, some in acts.last.items()}
    for some in rows.values():
        some[:, 3] = bad
    wrong = Activations(acts.samples, rows, rows)
    for fit in (
        lambda: fit_care(CARE, 1, contrasts_of(acts, spoilt)),
        lambda: fit_care(CARE, 1, contrasts_of(wrong, turns)),
        lambda: safety_direction_edit(wrong, 1, 1, "add"),
        lambda: mean_difference_push(wrong, 1),
    ):
        with pytest.raises(MalformedError, match="finite: False") as caught:
            fit()
        assert caught.value.exit_code == 9
    assert fit_care(CARE, 1, contrasts_of(acts, turns)).edit.branches  # the rows were the fault


def test_a_rank_larger_than_the_samples(made: Any) -> None:
    acts = made.activations({}, prompts=5)
    turns = np.random.default_rng(0).standard_normal((5, made.width)).astype(np.float32)
    eight = CARE.model_copy(update={"rank": 8})
    public = eight.model_copy(update={"numerics": "public"})
    for fit in (
        lambda: fit_care(eight, 1, contrasts_of(acts, turns)),
        lambda: fit_care(public, 1, contrasts_of(acts, turns)),
        lambda: safety_direction_edit(acts, 1, 8, "add"),
    ):
        with pytest.raises(MalformedError, match=r"at least [89] finite rows") as caught:
            fit()
        assert caught.value.exit_code == 9
