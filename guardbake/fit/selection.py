"""How good a discriminative subspace is on rows it has not seen, and what follows for its ridge,
rank and trust (METHODS 5). All of it on the fit split: nothing here sees a held-out prompt.

Two shares of squared length, over rows left out of the fit, about the fit's benign mean: what the
subspace holds of malicious rows (energy) and of benign ones (distortion, which an edit takes away
from prompts that did no harm). The ratio on the fitted rows themselves says nothing: with fewer
samples than dimensions it can be made as large as one likes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt
import scipy.linalg

from guardbake.covariance import Matrix, Ridge, finite_rows
from guardbake.errors import MalformedError
from guardbake.fit.subspace import discriminative_subspace

FOLDS, DRAWS = 5, 20
MOST = 64
RIDGES = (1e-3, 1e-2, 0.1, 1.0, 10.0)
ENOUGH = 0.9


@dataclass(frozen=True, eq=False)
class HeldOut:
    """energy [k], distortion [k]: shares held by the first 1 to k dimensions, in [0, 1]."""

    energy: Matrix
    distortion: Matrix


@dataclass(frozen=True)
class Stability:
    """Over bootstrap draws of the rows, against the fit on all of them.

    overlap: mean of |Q^T Q'|^2 / k, 1 for the same span, k / d for one at random. angle: median of
    the largest principal angle, radians.
    """

    overlap: float
    angle: float


def held_out(malicious: npt.ArrayLike, benign: npt.ArrayLike, rank: int, ridge: Ridge) -> HeldOut:
    """Cross-fitted over 5 folds; row i of either class falls into fold i % 5.

    malicious [N, d], benign [M, d]. Raises MalformedError if the folds leave too few rows.
    """
    bad, good = (finite_rows(rows, "held-out shares", FOLDS) for rows in (malicious, benign))
    shares: dict[str, list[Matrix]] = {"energy": [], "distortion": []}
    for fold in range(FOLDS):
        out = [np.arange(len(rows)) % FOLDS == fold for rows in (bad, good)]
        fit = discriminative_subspace(bad[~out[0]], good[~out[1]], rank, ridge)
        for name, rows in (("energy", bad[out[0]]), ("distortion", good[out[1]])):
            away = rows - fit.centre
            inside = ((away @ fit.basis) ** 2).cumsum(axis=1)
            shares[name].append(inside / (away**2).sum(axis=1, keepdims=True))
    return HeldOut(*(np.concatenate(shares[n]).mean(axis=0) for n in ("energy", "distortion")))


def largest_rank(count: int, width: int) -> int:
    """The most dimensions to choose a rank from: 64, or half of what a fold's rows can span."""
    return max(1, min(MOST, count * (FOLDS - 1) // FOLDS // 2, width // 2))


def choose_ridge(
    malicious: npt.ArrayLike, benign: npt.ArrayLike, rank: int, ridges: Sequence[float] = RIDGES
) -> float:
    """The ridge of least held-out benign distortion; of equal ones the larger.

    A small ridge picks directions in which the few benign rows happen not to vary, and others do; a
    large one picks whatever varies most.
    """
    found = {r: float(held_out(malicious, benign, rank, r).distortion[-1]) for r in ridges}
    return min(found, key=lambda r: (found[r], -r))


def choose_rank(malicious: npt.ArrayLike, benign: npt.ArrayLike, most: int, ridge: Ridge) -> int:
    """The smallest rank with 0.9 of the largest held-out energy less distortion, up to `most`.

    Raises MalformedError if no rank holds more of malicious rows than of benign ones.
    """
    shares = held_out(malicious, benign, most, ridge)
    excess = shares.energy - shares.distortion
    if not excess.max() > 0:
        raise MalformedError(
            found=f"no rank up to {most} that holds more of malicious rows than of benign ones",
            expected="a subspace that tells them apart on rows left out",
            where="choosing a rank",
            remedy="take another layer or contrast, or give more samples",
        )
    return int(np.argmax(excess >= ENOUGH * excess.max())) + 1


def bootstrap(
    malicious: npt.ArrayLike, benign: npt.ArrayLike, rank: int, ridge: Ridge, seed: int = 0
) -> Stability:
    """20 draws of as many rows with replacement from each class.

    Raises MalformedError where a draw does not span the rank.
    """
    bad, good = (finite_rows(rows, "bootstrap", 2) for rows in (malicious, benign))
    whole = discriminative_subspace(bad, good, rank, ridge).basis
    rng = np.random.default_rng(seed)
    cosines = []
    for _ in range(DRAWS):
        some, others = (rows[rng.integers(0, len(rows), len(rows))] for rows in (bad, good))
        basis = discriminative_subspace(some, others, rank, ridge).basis
        cosines.append(scipy.linalg.svdvals(whole.T @ basis).clip(0, 1))
    angles = np.arccos(np.array(cosines)[:, -1])
    return Stability(float((np.array(cosines) ** 2).mean()), float(np.median(angles)))


def trust(
    malicious: npt.ArrayLike, benign: npt.ArrayLike, rank: int, ridge: Ridge
) -> dict[str, object]:
    """Both kinds of evidence as JSON values; null where there are too few rows to have any.

    A bootstrap draw holds 0.63 of the rows, and must span the rank.
    """
    counts = len(np.asarray(malicious)), len(np.asarray(benign))
    if counts[0] < 3 * rank or min(counts) < 2 * FOLDS:
        return {"held_out": None, "bootstrap": None}
    shares = held_out(malicious, benign, rank, ridge)
    return {
        "held_out": {
            "energy": float(shares.energy[-1]),
            "distortion": float(shares.distortion[-1]),
        },
        "bootstrap": asdict(bootstrap(malicious, benign, rank, ridge)),
    }


def winsorised(
    malicious: npt.ArrayLike, benign: npt.ArrayLike, share: float
) -> tuple[Matrix, Matrix]:
    """Both classes with each dimension cut at the `share` and 1 - `share` quantiles of all rows.

    A few outlier dimensions otherwise dominate a covariance, and the ridge that is relative to it.
    """
    bad, good = (finite_rows(rows, "winsorising", 1) for rows in (malicious, benign))
    if share == 0:
        return bad, good
    low, high = np.quantile(np.concatenate([bad, good]), [share, 1 - share], axis=0)
    return bad.clip(low, high), good.clip(low, high)
