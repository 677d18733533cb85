"""Subspaces agree with their definitions, solved the long way: dense, d x d, by scipy."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import scipy.linalg
from hypothesis import given
from hypothesis import strategies as st

from guardbake.covariance import Ridge, shrinkage
from guardbake.errors import MalformedError
from guardbake.fit.subspace import (
    discriminant_direction,
    discriminative_subspace,
    largest_angle,
    mean_difference,
    safety_directions,
)

Matrix = npt.NDArray[np.float64]
SEEDS = st.integers(0, 2**32 - 1)


def samples(seed: int, bad: int, good: int, width: int) -> tuple[Matrix, Matrix]:
    """Harmful and harmless rows with unequal variances and a shift, so that eigenvalues differ."""
    rng = np.random.default_rng(seed)
    scales = np.geomspace(3, 0.1, width)
    extra = rng.standard_normal((3, width)) * np.array([[4.0], [3.0], [2.0]])
    harmful = rng.standard_normal((bad, width)) * scales + rng.standard_normal((bad, 3)) @ extra
    return harmful + rng.standard_normal(width), rng.standard_normal((good, width)) * scales + 1


def shrinkage_as_defined(centred: Matrix) -> float:
    """Ledoit and Wolf, section 3.2: b^2 / d^2, each d x d matrix written out."""
    count, width = centred.shape
    s = centred.T @ centred / count
    distance = ((s - np.trace(s) / width * np.eye(width)) ** 2).sum()
    error = sum(((np.outer(x, x) - s) ** 2).sum() for x in centred) / count**2
    return float(min(error, distance) / distance)


def dense(bad: Matrix, good: Matrix, rank: int, ridge: Ridge) -> tuple[Matrix, Matrix]:
    """(basis, eigenvalues) of the d x d pair."""
    width, centre = bad.shape[1], good.mean(axis=0)
    bad, good = bad - centre, good - centre
    moment, covariance = bad.T @ bad / len(bad), good.T @ good / len(good)
    mean = np.trace(covariance) / width
    if ridge == "ledoit-wolf":
        weight = shrinkage_as_defined(good)
        covariance = (1 - weight) * covariance + weight * mean * np.eye(width)
    else:
        covariance = covariance + float(ridge) * mean * np.eye(width)
    values, vectors = scipy.linalg.eigh(moment, covariance)
    return np.linalg.qr(vectors[:, ::-1][:, :rank])[0], values[::-1][:rank]


@pytest.mark.parametrize("ridge", [1e-2, 0.1, 1.0, "ledoit-wolf"])
@pytest.mark.parametrize(
    ("bad", "good", "width"), [(12, 15, 200), (30, 20, 64), (80, 100, 24), (6, 120, 40)]
)
@pytest.mark.parametrize("rank", [1, 4])
def test_the_small_problem_has_the_dense_solution(
    bad: int, good: int, width: int, ridge: Ridge, rank: int
) -> None:
    harmful, harmless = samples(3, bad, good, width)
    found = discriminative_subspace(harmful, harmless, rank, ridge)
    basis, values = dense(harmful, harmless, rank, ridge)
    assert largest_angle(found.basis, basis) < 1e-9
    assert np.abs(found.spectrum / values - 1).max() < 1e-9
    assert (np.diff(found.spectrum) <= 0).all()
    assert np.abs(found.centre - harmless.mean(axis=0)).max() < 1e-12


@pytest.mark.parametrize("ridge", [1e-3, 0.1, "ledoit-wolf"])
def test_outlier_dimensions_cost_no_digits(ridge: Ridge) -> None:
    """Two dimensions 300 times as large as the others, as residual streams have them."""
    harmful, harmless = samples(4, 60, 50, 400)
    for rows in (harmful, harmless):
        rows[:, [3, 17]] *= 300
    found = discriminative_subspace(harmful, harmless, 8, ridge)
    assert largest_angle(found.basis, dense(harmful, harmless, 8, ridge)[0]) < 1e-9


def test_the_angle_is_not_blind() -> None:
    """Another ridge or another rank of the same data is another subspace by far more than 1e-9."""
    harmful, harmless = samples(3, 12, 15, 200)
    found = discriminative_subspace(harmful, harmless, 4, 0.1).basis
    assert largest_angle(found, dense(harmful, harmless, 4, 0.11)[0]) > 1e-4


@given(SEEDS, st.integers(1, 6), st.sampled_from([1e-3, 0.1, 10.0, "ledoit-wolf"]))
def test_the_basis_is_orthonormal(seed: int, rank: int, ridge: Ridge) -> None:
    harmful, harmless = samples(seed, 9, 11, 50)
    basis = discriminative_subspace(harmful, harmless, rank, ridge).basis
    assert basis.shape == (50, rank)
    assert np.abs(basis.T @ basis - np.eye(rank)).max() < 1e-10


@given(SEEDS, st.integers(2, 30), st.integers(1, 20))
def test_shrinkage_is_its_definition(seed: int, count: int, width: int) -> None:
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((count, width)) * rng.uniform(0.1, 3, width)
    rows -= rows.mean(axis=0)
    if width == 1:
        assert shrinkage(rows) == 1.0  # nothing to shrink: S is already a multiple of I
    else:
        assert abs(shrinkage(rows) - shrinkage_as_defined(rows)) < 1e-9


def test_shrinkage_falls_with_samples_and_stays_in_bounds() -> None:
    rng = np.random.default_rng(0)
    found = [shrinkage(rng.standard_normal((n, 10)) * np.arange(1, 11)) for n in (5, 50, 5000)]
    assert 1 >= found[0] > found[1] > found[2] > 0
    assert shrinkage(np.zeros((5, 3))) == 1.0


def test_the_mean_shift_counts() -> None:
    """C_m is taken about the benign mean: a pure shift is found."""
    rng = np.random.default_rng(0)
    harmless = rng.standard_normal((200, 12))
    shift = np.eye(12)[4]
    harmful = rng.standard_normal((200, 12)) + 6 * shift
    found = discriminative_subspace(harmful, harmless, 1, 0.1)
    # 12 dimensions from 200 rows: sqrt(12 / 200) = 0.24 radians, whose cosine is 0.97
    assert abs(found.basis[:, 0] @ shift) > 0.95
    # about its own mean the harmful rows are noise, of the same kind as the harmless
    blind = discriminative_subspace(harmful - 6 * shift, harmless, 1, 0.1)
    assert abs(blind.basis[:, 0] @ shift) < 0.95


@pytest.mark.parametrize(
    ("rank", "ridge", "says"),
    [(25, 0.1, "at least 25"), (5, 0.0, "ridge"), (5, -1.0, "ridge"), (5, float("nan"), "ridge")],
)
def test_what_cannot_be_solved_is_refused(rank: int, ridge: float, says: str) -> None:
    harmful, harmless = samples(0, 30, 12, 24)
    with pytest.raises(MalformedError, match=says):
        discriminative_subspace(harmful[:12], harmless, rank, ridge)


def test_a_rank_beyond_the_span_of_the_samples_is_refused() -> None:
    rng = np.random.default_rng(0)
    flat = rng.standard_normal((40, 3)) @ rng.standard_normal((3, 24))
    with pytest.raises(MalformedError, match="rank 4 asked of malicious samples that span 3"):
        discriminative_subspace(flat[:20], flat[20:], 4, 0.1)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_rows_that_are_not_finite_are_refused(bad: float) -> None:
    harmful, harmless = samples(0, 12, 12, 24)
    harmful[3, 3] = bad
    calls: list[Any] = [
        lambda: discriminative_subspace(harmful, harmless, 2, 0.1),
        lambda: safety_directions(harmful, harmless, 2),
        lambda: mean_difference(harmful, harmless),
        lambda: discriminant_direction(harmful, harmless, np.zeros(24), 0.1),
    ]
    for call in calls:
        with pytest.raises(MalformedError, match="finite"):
            call()


def test_rows_of_no_difference_are_refused() -> None:
    same = np.ones((8, 5))
    with pytest.raises(MalformedError):
        discriminative_subspace(same, same, 1, 0.1)
    with pytest.raises(MalformedError):
        discriminant_direction(same, same, np.zeros(16), 0.1)


def test_float32_rows_are_solved_in_float64() -> None:
    harmful, harmless = samples(1, 10, 10, 60)
    single = [rows.astype(np.float32) for rows in (harmful, harmless)]
    found = discriminative_subspace(*single, 3, 0.1)
    again = discriminative_subspace(*(rows.astype(np.float64) for rows in single), 3, 0.1)
    assert found.basis.dtype == np.float64
    assert found.basis.tobytes() == again.basis.tobytes()


def test_two_benign_rows_leave_ledoit_wolf_nothing_to_shrink_by() -> None:
    harmful, harmless = samples(0, 12, 2, 24)
    with pytest.raises(MalformedError, match="ridge above zero"):
        discriminative_subspace(harmful, harmless, 2, "ledoit-wolf")
    assert discriminative_subspace(harmful, harmless, 2, 0.1).basis.shape == (24, 2)


def test_a_rank_beyond_the_malicious_samples_is_refused_however_many_benign_there_are() -> None:
    """Beyond their span an eigenvalue is zero: the direction would be one of nothing."""
    harmful, harmless = samples(0, 5, 40, 64)
    with pytest.raises(MalformedError, match="at least 6"):
        discriminative_subspace(harmful, harmless, 6, 0.1)
    with pytest.raises(MalformedError, match="rank 6 asked of malicious samples that span 5"):
        discriminative_subspace(np.repeat(harmful, 2, axis=0), harmless, 6, 0.1)


# ---- safety directions


@given(SEEDS, st.integers(1, 5))
def test_safety_directions_are_the_top_right_singular_vectors(seed: int, rank: int) -> None:
    """By hand: eigenvectors of the d x d Gram matrix of the paired differences, not centred."""
    harmful, harmless = samples(seed, 10, 10, 20)
    found = safety_directions(harmful, harmless, rank)
    difference = harmful - harmless
    values, vectors = np.linalg.eigh(difference.T @ difference)
    values, vectors = values[::-1][:rank], vectors[:, ::-1][:, :rank]
    # squaring the singular values halves the digits where they lie close: 1e-6 for 1e-12
    assert np.abs(found.spectrum**2 / values - 1).max() < 1e-9
    assert np.abs(np.abs((found.basis * vectors).sum(axis=0)) - 1).max() < 1e-6
    assert np.abs(found.basis.T @ found.basis - np.eye(rank)).max() < 1e-10
    assert ((difference.mean(axis=0) @ found.basis) >= 0).all()
    assert np.abs(found.centre - harmless.mean(axis=0)).max() < 1e-12


def test_swapping_the_classes_turns_every_direction() -> None:
    harmful, harmless = samples(5, 10, 10, 20)
    there = safety_directions(harmful, harmless, 3).basis
    back = safety_directions(harmless, harmful, 3).basis
    assert np.abs(there + back).max() < 1e-9


def test_rows_that_are_no_pairs_are_refused() -> None:
    harmful, harmless = samples(5, 10, 9, 20)
    with pytest.raises(MalformedError, match="pairs"):
        safety_directions(harmful, harmless, 2)
    with pytest.raises(MalformedError, match="at least 11"):
        safety_directions(harmful, harmful, 11)


def test_the_pairing_matters() -> None:
    harmful, harmless = samples(5, 10, 10, 20)
    other = safety_directions(harmful, harmless[::-1], 2).basis
    assert largest_angle(safety_directions(harmful, harmless, 2).basis, other) > 1e-3


def test_the_mean_difference_is_not_normalised() -> None:
    assert mean_difference([[2.0, 0.0], [4.0, 0.0]], [[0.0, 1.0], [0.0, 3.0]]).tolist() == [3, -2]


# ---- discriminant


def test_the_discriminant_is_the_dense_one() -> None:
    """(C_w + ridge tr(C_w)/d I)^-1 shift, the harmless shift between the groups taken out first,
    then the means of class and group."""
    harmful, harmless = samples(2, 20, 24, 60)
    groups = np.r_[np.arange(20) % 2, np.arange(24) % 2]
    form = harmless[groups[20:] == 0].mean(axis=0) - harmless[groups[20:] == 1].mean(axis=0)
    blind = np.eye(60) - np.outer(form, form) / (form @ form)
    given_harmful, given_harmless = harmful, harmless
    harmful, harmless = harmful @ blind, harmless @ blind
    rows, label = np.concatenate([harmful, harmless]), np.r_[np.ones(20), np.zeros(24)]
    covariance, shifts = np.zeros((60, 60)), []
    for g in (0, 1):
        means = []
        for kind in (1, 0):
            some = rows[(groups == g) & (label == kind)]
            means.append(some.mean(axis=0))
            covariance += (some - means[-1]).T @ (some - means[-1]) / len(rows)
        shifts.append(means[0] - means[1])
    covariance += 0.3 * np.trace(covariance) / 60 * np.eye(60)
    expected = np.linalg.solve(covariance, np.mean(shifts, axis=0))
    found = discriminant_direction(given_harmful, given_harmless, groups, 0.3)
    assert np.abs(found - expected / np.linalg.norm(expected)).max() < 1e-9


@given(SEEDS)
def test_the_discriminant_finds_a_planted_direction(seed: int) -> None:
    rng = np.random.default_rng(seed)
    planted = rng.standard_normal(30)
    planted /= np.linalg.norm(planted)
    harmless, harmful = rng.standard_normal((2, 400, 30))
    found = discriminant_direction(harmful + 4 * planted, harmless, np.zeros(800), 0.1)
    assert abs(np.linalg.norm(found) - 1) < 1e-12
    # a covariance of 30 dimensions from 800 rows turns it by about sqrt(30 / 800) = 0.19 radians;
    # cos 0.32 = 0.95. A direction at random would have a cosine of 0.18
    assert found @ planted > 0.95


@given(SEEDS, st.floats(5, 100))
def test_the_discriminant_is_blind_to_the_form(seed: int, distance: float) -> None:
    """Two forms far apart, unequally many of each in the classes: how far does not matter, and one
    threshold serves both, because the harmless means of the forms score alike."""
    rng = np.random.default_rng(seed)
    harmless, harmful = rng.standard_normal((2, 200, 20))
    harmful[:, 0] += 2
    bad, good = np.arange(200) < 150, np.arange(200) < 50
    apart = harmless[good].mean(axis=0) - harmless[~good].mean(axis=0)
    near = discriminant_direction(harmful, harmless, np.r_[bad, good], 0.1)
    harmful[bad] += distance * apart
    harmless[good] += distance * apart
    far = discriminant_direction(harmful, harmless, np.r_[bad, good], 0.1)
    assert np.abs(far - near).max() < 1e-9
    assert abs(far @ apart) < 1e-9
    ignorant = discriminant_direction(harmful, harmless, np.zeros(400), 0.1)
    assert abs(ignorant @ apart) > 1e-3  # the groups are what makes it blind


def test_a_form_with_one_label_alone_is_refused() -> None:
    harmful, harmless = samples(0, 10, 10, 12)
    with pytest.raises(MalformedError, match="every group"):
        discriminant_direction(harmful, harmless, np.r_[np.zeros(10), np.ones(10)], 0.1)
