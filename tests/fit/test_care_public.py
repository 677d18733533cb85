"""The compatibility mode is the public recipe, rendered here the long way: d x d, step by step."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import scipy.linalg

from guardbake.errors import MalformedError
from guardbake.fit.care_public import public_subspace
from guardbake.fit.subspace import discriminative_subspace, largest_angle

Matrix = npt.NDArray[np.float64]


def rows(seed: int, count: int, width: int, extra: float) -> Matrix:
    """Correlated rows about a mean of their own, with `extra` variance along four directions."""
    rng = np.random.default_rng(seed)
    shared = np.random.default_rng(99).standard_normal((4, width)) / np.sqrt(width)
    noise = rng.standard_normal((count, width)) * np.geomspace(2, 0.2, width)
    strong = rng.standard_normal((count, 4)) * np.array([4.0, 3.0, 2.0, 1.5]) * extra
    return noise + strong @ shared * np.sqrt(width) + rng.standard_normal(width)


def as_published(malicious: Matrix, benign: Matrix, rank: int) -> Matrix:
    """The projector U U^T [d, d]: sqrtm, inv, eigh, columns scaled one by one."""
    width = malicious.shape[1]
    own = np.cov(malicious, rowvar=False, bias=True)
    regular = np.cov(benign, rowvar=False, bias=True) + 1e-6 * np.eye(width)
    whitening = np.linalg.inv(np.real(scipy.linalg.sqrtm(regular)))
    whitened = whitening @ own @ whitening
    values, vectors = np.linalg.eigh((whitened + whitened.T) / 2)
    chosen = whitening @ vectors[:, np.argsort(values)[::-1][:rank]]
    unit = chosen / np.linalg.norm(chosen, axis=0)
    return unit @ unit.T


@pytest.mark.parametrize(
    ("bad", "good", "width", "rank"),
    [(40, 36, 160, 8), (40, 36, 160, 1), (30, 60, 50, 6), (90, 200, 32, 10)],
)
def test_it_agrees_with_the_public_recipe(bad: int, good: int, width: int, rank: int) -> None:
    malicious, benign = rows(1, bad, width, 1.0), rows(2, good, width, 0.3)
    found = public_subspace(malicious, benign, rank)
    projector = (found.basis * found.gains) @ found.basis.T
    assert np.abs(projector - as_published(malicious, benign, rank)).max() < 1e-6
    assert np.abs(found.basis.T @ found.basis - np.eye(rank)).max() < 1e-10
    assert np.abs(found.centre - benign.mean(axis=0)).max() < 1e-12
    assert found.gains.sum() == pytest.approx(rank)  # the trace of U U^T: rank unit columns
    assert (np.diff(found.gains) <= 0).all()


def test_the_public_projector_is_no_projection_and_ours_is() -> None:
    malicious, benign = rows(1, 90, 32, 1.0), rows(2, 200, 32, 0.3)
    published = as_published(malicious, benign, 10)
    assert np.abs(published @ published - published).max() > 0.01
    basis = discriminative_subspace(malicious, benign, 10, 0.1).basis
    ours = basis @ basis.T
    assert np.abs(ours @ ours - ours).max() < 1e-12


def test_a_shift_of_the_mean_is_invisible_to_it() -> None:
    malicious, benign = rows(1, 40, 64, 1.0), rows(2, 36, 64, 0.3)
    shifted = malicious + 50 * np.eye(64)[7]
    there, here = public_subspace(shifted, benign, 4), public_subspace(malicious, benign, 4)
    assert largest_angle(there.basis, here.basis) < 1e-6  # rounding of numbers 50 times as large
    ours, unmoved = (discriminative_subspace(m, benign, 4, 0.1) for m in (shifted, malicious))
    assert largest_angle(ours.basis, unmoved.basis) > 0.5


def test_the_same_rows_give_the_same_bytes() -> None:
    malicious, benign = rows(1, 40, 64, 1.0), rows(2, 36, 64, 0.3)
    first, second = (public_subspace(malicious, benign, 4) for _ in range(2))
    assert first.basis.tobytes() == second.basis.tobytes()
    assert first.gains.tobytes() == second.gains.tobytes()


def test_the_rank_must_lie_below_the_count() -> None:
    """About its own mean N rows span N - 1 dimensions."""
    malicious, benign = rows(1, 8, 64, 1.0), rows(2, 36, 64, 0.3)
    assert public_subspace(malicious, benign, 7).basis.shape == (64, 7)
    with pytest.raises(MalformedError, match="at least 9"):
        public_subspace(malicious, benign, 8)
