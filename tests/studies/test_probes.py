"""Probes, components and draws of anchors against what can be said of them beforehand."""

from __future__ import annotations

import numpy as np
import pytest

from guardbake.diagnose.separability import area_under_curve
from guardbake.studies.anchors import narrow, random, spread
from guardbake.studies.probes import (
    components,
    cross_fitted,
    gaussian_kernels,
    kernel_components,
    linear_kernels,
)

FOLDS = np.arange(120) % 4


def ring(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """120 rows: harmful ones in the middle, harmless ones around; no plane tells them apart."""
    angle = rng.uniform(0, 2 * np.pi, 120)
    harmful = np.arange(120) < 60
    radius = np.where(harmful, 0.3, 2.0) + rng.normal(0, 0.1, 120)
    rows = np.c_[radius * np.cos(angle), radius * np.sin(angle), rng.normal(0, 0.1, 120)]
    order = rng.permutation(120)
    return rows[order], harmful[order]


def area(rows: np.ndarray, harmful: np.ndarray, kernels: object) -> float:
    scores = cross_fitted(rows, harmful, FOLDS, kernels)  # type: ignore[arg-type]
    return area_under_curve(scores[harmful], scores[~harmful])


def test_only_the_kernel_probe_sees_a_ring() -> None:
    rows, harmful = ring(np.random.default_rng(0))
    assert area(rows, harmful, gaussian_kernels) > 0.99
    assert 0.3 < area(rows, harmful, linear_kernels) < 0.7


def test_both_probes_see_a_shift_and_neither_sees_noise() -> None:
    rng = np.random.default_rng(1)
    harmful = rng.permutation(120) < 60
    rows = rng.standard_normal((120, 30))
    for kernels in (linear_kernels, gaussian_kernels):
        assert 0.3 < area(rows, harmful, kernels) < 0.7
        assert area(rows + 2.0 * harmful[:, None], harmful, kernels) > 0.99


def test_a_probe_never_sees_the_rows_that_it_scores() -> None:
    rng = np.random.default_rng(2)
    harmful = rng.permutation(120) < 60
    rows = rng.standard_normal((120, 30))
    scores = cross_fitted(rows, harmful, FOLDS, linear_kernels)
    turned = harmful.copy()
    turned[FOLDS == 1] = ~turned[FOLDS == 1]
    other = cross_fitted(rows, turned, FOLDS, linear_kernels)
    np.testing.assert_array_equal(scores[FOLDS == 1], other[FOLDS == 1])
    assert (scores[FOLDS == 0] != other[FOLDS == 0]).any()


def test_the_ridge_is_chosen_by_what_leaving_one_out_would_give() -> None:
    # the closed form of the residual left out, against fitting again without the row
    rng = np.random.default_rng(3)
    rows, target, ridge = rng.standard_normal((20, 4)), rng.standard_normal(20), 0.7
    gram = rows @ rows.T
    inverse = np.linalg.inv(gram + ridge * np.eye(20))
    fast = inverse @ target / np.diag(inverse)
    for left in range(20):
        own = np.arange(20) != left
        weights = np.linalg.solve(gram[np.ix_(own, own)] + ridge * np.eye(19), target[own])
        assert target[left] - gram[left, own] @ weights == pytest.approx(fast[left])


def test_components_are_those_of_the_covariance_and_of_one_sign() -> None:
    rng = np.random.default_rng(4)
    rows = rng.standard_normal((50, 6)) * (5, 3, 1, 1, 1, 1) + 7
    found = components(rows, 2)
    values = np.linalg.eigvalsh(np.cov(rows.T, bias=True))[::-1][:2]
    np.testing.assert_allclose((found**2).mean(0), values)
    for points in (found, kernel_components(rows, 2)):
        largest = points[np.abs(points).argmax(0), (0, 1)]
        assert (largest > 0).all()
        assert abs(points[:, 0] @ points[:, 1]) < 1e-8
        np.testing.assert_allclose(points.mean(0), 0, atol=1e-9)


def test_kernel_components_tell_a_ring_from_its_middle() -> None:
    rows, harmful = ring(np.random.default_rng(5))
    points = kernel_components(rows, 2)
    plain = components(rows, 2)

    def apart(found: np.ndarray) -> float:
        areas = [area_under_curve(found[harmful, c], found[~harmful, c]) for c in (0, 1)]
        return max(abs(one - 0.5) for one in areas)

    radius = np.linalg.norm(points - points[harmful].mean(0), axis=1)
    assert area_under_curve(radius[~harmful], radius[harmful]) > 0.99
    assert apart(plain) < 0.25


def test_draws_are_narrow_and_spread_and_without_repetition() -> None:
    rng = np.random.default_rng(6)
    rows = np.r_[rng.normal(0, 0.1, (10, 3)), rng.normal(9, 0.1, (10, 3))]
    for draw in (random, narrow, spread):
        chosen = draw(rows, 6, np.random.default_rng(0))
        assert len(set(chosen.tolist())) == 6
        assert chosen.tolist() == draw(rows, 6, np.random.default_rng(0)).tolist()
        assert sorted(draw(rows, 20, np.random.default_rng(1)).tolist()) == list(range(20))
    near = narrow(rows, 6, np.random.default_rng(0))
    assert len({int(n >= 10) for n in near}) == 1
    far = spread(rows, 2, np.random.default_rng(0))
    assert len({int(n >= 10) for n in far}) == 2
