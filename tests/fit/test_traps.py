"""The traps of METHODS, planted: each is caught, and by the error that says so."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import scipy.linalg

from guardbake.covariance import finite_rows
from guardbake.errors import MalformedError
from guardbake.fit.care_public import public_subspace
from guardbake.fit.subspace import (
    discriminative_subspace,
    largest_angle,
    mean_difference,
    safety_directions,
)

Matrix = npt.NDArray[np.float64]


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
