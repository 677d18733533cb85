"""Covariances of few samples in many dimensions: what both diagnosis and fitting need of them.

With N rows of width d and N << d nothing here forms a d x d matrix: every quantity follows from the
N x N inner products.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt

from guardbake.errors import MalformedError

Matrix = npt.NDArray[np.float64]
Ridge = float | Literal["ledoit-wolf"]


def finite_rows(array: npt.ArrayLike, where: str, least: int) -> Matrix:
    """[N, d] in float64. float16 is refused: what it has lost no later precision brings back."""
    given = np.asarray(array)
    if given.dtype == np.float16:
        raise MalformedError(
            found="activations in float16",
            expected="float32 or wider: sums of squares overflow, and small directions are lost",
            where=where,
            remedy="capture again, which gives float32 whatever the model's own precision",
        )
    rows = given.astype(np.float64)
    if rows.ndim != 2 or len(rows) < least or not np.isfinite(rows).all():
        raise MalformedError(
            found=f"activations of shape {rows.shape}, finite: {bool(np.isfinite(rows).all())}",
            expected=f"at least {least} finite rows",
            where=where,
            remedy="give more samples or ask for a smaller rank; if not finite, capture again",
        )
    return rows


def shrinkage(centred: Matrix) -> float:
    """Ledoit-Wolf intensity for rows already centred (J. Multivariate Analysis 88, 2004, 3.2).

    Through the N x N Gram matrix: with S = X^T X / N and m = tr S / d, the ratio of the sampling
    error of S to its distance from m I, in [0, 1].
    """
    count, width = centred.shape
    gram = centred @ centred.T
    trace = np.trace(gram) / count
    square = float((gram**2).sum()) / count**2
    distance = square - trace**2 / width
    sampling = (float((np.diag(gram) ** 2).sum()) / count - square) / count
    if distance <= 1e-12 * square:  # S is a multiple of I up to rounding: nothing to shrink
        return 1.0
    return float(np.clip(sampling / distance, 0.0, 1.0))


def shrunken(centred: Matrix, ridge: Ridge, where: str) -> tuple[float, float]:
    """(a, e) of the shrunken covariance a X^T X / N + e I of centred rows X [N, d], e > 0.

    "ledoit-wolf": a = 1 - w and e = w tr(S) / d with the intensity w; a number: a = 1 and
    e = ridge * tr(S) / d. Raises MalformedError if e is not above zero.
    """
    mean_variance = float((centred**2).sum()) / centred.size
    weight = shrinkage(centred) if ridge == "ledoit-wolf" else float(ridge)
    if not weight * mean_variance > 0:
        raise MalformedError(
            found=f"ridge {ridge}, which is {weight:.3g}, and mean variance {mean_variance:.3g}",
            expected="a ridge above zero, and samples that differ",
            where=where,
            remedy="give a ridge such as 0.1: few rows may leave Ledoit-Wolf nothing to shrink by",
        )
    kept = 1 - weight if ridge == "ledoit-wolf" else 1.0
    return kept, weight * mean_variance


def solve_shrunken(centred: Matrix, ridge: Ridge, vectors: Matrix, where: str) -> Matrix:
    """S_e^-1 V for the shrunken covariance S_e of centred rows X [N, d] and columns V [d, n].

    Exactly, by Woodbury's identity: S_e^-1 V = (V - X^T (e N / a I + X X^T)^-1 X V) / e, one
    N x N system.
    """
    kept, floor = shrunken(centred, ridge, where)
    if kept == 0:
        return vectors / floor
    inner = centred @ centred.T
    inner[np.diag_indices_from(inner)] += floor * len(centred) / kept
    return np.asarray((vectors - centred.T @ np.linalg.solve(inner, centred @ vectors)) / floor)
