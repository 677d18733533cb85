"""The shrunken covariance, solved by inner products, against the d x d matrix written out."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from guardbake.covariance import Matrix, Ridge, finite_rows, shrinkage, shrunken, solve_shrunken
from guardbake.errors import MalformedError

RIDGES: tuple[Ridge, ...] = (0.01, 1.0, "ledoit-wolf")


def centred(seed: int, count: int, width: int) -> Matrix:
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((count, width)) * rng.uniform(0.1, 3, width)
    return np.asarray(rows - rows.mean(axis=0))


@given(st.integers(0, 2**32 - 1), st.integers(3, 30), st.integers(2, 40), st.sampled_from(RIDGES))
def test_the_solution_is_the_dense_one(seed: int, count: int, width: int, ridge: Ridge) -> None:
    rows = centred(seed, count, width)
    covariance = rows.T @ rows / count
    mean = np.trace(covariance) / width
    if ridge == "ledoit-wolf":
        weight = shrinkage(rows)
        dense = (1 - weight) * covariance + weight * mean * np.eye(width)
    else:
        dense = covariance + ridge * mean * np.eye(width)
    vectors = np.random.default_rng(seed).standard_normal((width, 2))
    found = solve_shrunken(rows, ridge, vectors, "here")
    expected = np.linalg.solve(dense, vectors)
    assert np.abs(found - expected).max() < 1e-9 * np.abs(expected).max()
    kept, floor = shrunken(rows, ridge, "here")
    assert np.allclose(kept * covariance + floor * np.eye(width), dense, rtol=1e-12, atol=0)


def test_no_matrix_of_the_width_is_formed() -> None:
    """A d x d matrix of float64 would be 80 GB here."""
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((5, 100_000))
    rows -= rows.mean(axis=0)
    solved = solve_shrunken(rows, 0.1, rows[:1].T, "here")
    floor = 0.1 * float((rows**2).sum()) / rows.size
    back = rows.T @ (rows @ solved) / 5 + floor * solved
    assert np.abs(back - rows[:1].T).max() < 1e-9


@pytest.mark.parametrize("ridge", RIDGES)
def test_rows_that_do_not_differ_are_refused(ridge: Ridge) -> None:
    with pytest.raises(MalformedError, match="samples that differ"):
        shrunken(np.zeros((4, 3)), ridge, "here")


def test_a_ridge_of_zero_is_refused() -> None:
    with pytest.raises(MalformedError, match="ridge 0"):
        shrunken(centred(0, 5, 3), 0.0, "here")


def test_a_covariance_that_is_all_ridge() -> None:
    """Rows whose covariance is a multiple of I are shrunken wholly."""
    rows = np.concatenate([np.eye(3), -np.eye(3)])
    assert shrinkage(rows) == 1.0
    vectors = np.arange(3.0)[:, None]
    assert np.allclose(solve_shrunken(rows, "ledoit-wolf", vectors, "here"), 3 * vectors)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_rows_must_be_finite_and_wide_enough(bad: float) -> None:
    rows = np.ones((3, 2), np.float32)
    assert finite_rows(rows, "here", 3).dtype == np.float64
    with pytest.raises(MalformedError, match="at least 4") as caught:
        finite_rows(rows, "here", 4)
    assert caught.value.exit_code == 9
    rows[1, 1] = bad
    with pytest.raises(MalformedError, match="finite: False"):
        finite_rows(rows, "here", 2)
    with pytest.raises(MalformedError, match="float16"):
        finite_rows(np.ones((3, 2), np.float16), "here", 2)
