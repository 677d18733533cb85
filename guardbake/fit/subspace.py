"""Subspaces of activations in float64: safety directions and discriminative subspaces.

With a few hundred samples in a few thousand dimensions no d x d matrix is needed: every solution
lies in the span of the samples, so the problem is solved there exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import scipy.linalg

from guardbake.errors import MalformedError

Matrix = npt.NDArray[np.float64]
Ridge = float | Literal["ledoit-wolf"]
ORTHONORMAL = 1e-10


@dataclass(frozen=True, eq=False)
class Subspace:
    """basis [d, k] float64, orthonormal; centre [d]; spectrum [k], largest first."""

    basis: Matrix
    centre: Matrix
    spectrum: Matrix


def _rows(array: npt.ArrayLike, where: str, least: int) -> Matrix:
    rows = np.asarray(array, dtype=np.float64)
    if rows.ndim != 2 or len(rows) < least or not np.isfinite(rows).all():
        raise MalformedError(
            found=f"activations of shape {rows.shape}, finite: {bool(np.isfinite(rows).all())}",
            expected=f"at least {least} finite rows",
            where=where,
            remedy="give more samples, or capture again in float32",
        )
    return rows


def _orthonormal(vectors: Matrix) -> Matrix:
    """QR with positive diagonal: same span, one sign rule, |Q^T Q - I| < 1e-10."""
    basis, upper = np.linalg.qr(vectors)
    basis = basis * np.where(np.diag(upper) < 0, -1.0, 1.0)
    error = float(np.abs(basis.T @ basis - np.eye(basis.shape[1])).max())
    if not error < ORTHONORMAL:
        raise MalformedError(
            found=f"|Q^T Q - I| = {error:.3g}",
            expected=f"below {ORTHONORMAL}",
            where="orthonormalising a subspace",
            remedy="ask for a smaller rank: the samples do not span this one",
        )
    return basis


def safety_directions(harmful: npt.ArrayLike, harmless: npt.ArrayLike, rank: int) -> Subspace:
    """Top right singular vectors of paired differences (VLM-Guard, arXiv 2502.10486, section 3).

    harmful, harmless: [N, d], row i of one paired with row i of the other. No centring, as printed.
    A singular vector's sign is arbitrary: each is turned towards the mean difference.
    """
    where = "safety directions"
    a, b = _rows(harmful, where, rank), _rows(harmless, where, rank)
    if a.shape != b.shape:
        raise MalformedError(
            found=f"{a.shape} harmful and {b.shape} harmless rows",
            expected="pairs",
            where=where,
            remedy="give as many harmful as harmless anchors, in matching order",
        )
    _, sizes, right = np.linalg.svd(a - b, full_matrices=False)
    vectors = right[:rank].T
    towards = (a - b).mean(axis=0) @ vectors
    vectors = vectors * np.where(towards < 0, -1.0, 1.0)
    return Subspace(vectors, b.mean(axis=0), sizes[:rank])


def mean_difference(harmful: npt.ArrayLike, harmless: npt.ArrayLike) -> Matrix:
    """mean(harmful) - mean(harmless), [d], not normalised: its length is the push of one step."""
    where = "mean difference"
    return np.asarray(
        _rows(harmful, where, 2).mean(axis=0) - _rows(harmless, where, 2).mean(axis=0)
    )


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


def discriminative_subspace(
    malicious: npt.ArrayLike, benign: npt.ArrayLike, rank: int, ridge: Ridge
) -> Subspace:
    """Directions with most malicious second moment per benign variance (CARE, arXiv 2603.27240).

    malicious [N, d], benign [M, d]. Generalised eigenvectors of (C_m, C_b + e I): C_m about the
    benign mean, so that the mean shift counts; C_b the benign covariance; e = ridge * tr(C_b) / d,
    or Ledoit-Wolf's shrinkage of C_b. Solved exactly in the samples' span: for an eigenvalue above
    zero, e x = C_m x / lambda - C_b x lies in it. The basis is orthonormalised by QR in order.
    """
    where = "discriminative subspace"
    bad, good = _rows(malicious, where, rank), _rows(benign, where, 2)
    centre = good.mean(axis=0)
    bad, good = bad - centre, good - centre
    width = good.shape[1]
    _, sizes, right = np.linalg.svd(np.concatenate([bad, good]), full_matrices=False)
    span = right[sizes > sizes[0] * 1e-12]
    if rank > len(span):
        raise MalformedError(
            found=f"rank {rank} asked of samples that span {len(span)}",
            expected="a rank within the span",
            where=where,
            remedy="lower the rank or give more samples",
        )
    bad_in, good_in = bad @ span.T, good @ span.T
    moment = bad_in.T @ bad_in / len(bad)
    covariance = good_in.T @ good_in / len(good)
    mean_variance = float((good**2).sum()) / len(good) / width
    _require_ridge(ridge, mean_variance, where)
    if ridge == "ledoit-wolf":
        weight = shrinkage(good)
        covariance = (1 - weight) * covariance + weight * mean_variance * np.eye(len(span))
    else:
        covariance = covariance + float(ridge) * mean_variance * np.eye(len(span))
    top = (len(span) - rank, len(span) - 1)
    values, vectors = scipy.linalg.eigh(moment, covariance, subset_by_index=top)
    basis = _orthonormal(span.T @ vectors[:, ::-1])
    return Subspace(basis, centre, values[::-1])


def _require_ridge(ridge: Ridge, mean_variance: float, where: str) -> None:
    """Without a ridge the covariance of few samples has no inverse in the span of all of them."""
    if (ridge != "ledoit-wolf" and not ridge > 0) or mean_variance == 0:
        raise MalformedError(
            found=f"ridge {ridge}, mean variance {mean_variance:.3g}",
            expected="both above zero",
            where=where,
            remedy="give a ridge such as 0.1, and samples that differ",
        )


def discriminant_direction(
    harmful: npt.ArrayLike, harmless: npt.ArrayLike, groups: npt.ArrayLike, ridge: float
) -> Matrix:
    """A shrunken linear discriminant, [d], of unit length, larger on harmful.

    harmful, harmless [N, d], [M, d]; groups [N + M] int: rows of one form (text, image) share a
    group. The means are taken out within each group and class, so that only what tells harmful from
    harmless inside a form counts; and the direction is orthogonal to the shifts between the groups'
    harmless means, so that one threshold serves all forms.
    """
    where = "discriminant direction"
    bad, good = _rows(harmful, where, 2), _rows(harmless, where, 2)
    rows = np.concatenate([bad, good])
    label = np.r_[np.ones(len(bad), bool), np.zeros(len(good), bool)]
    group = np.asarray(groups)
    if any(len(np.unique(label[group == g])) < 2 for g in np.unique(group)):
        raise MalformedError(
            found="a group with harmful or harmless rows alone",
            expected="both in every group",
            where=where,
            remedy="give samples of both labels in every form",
        )
    rows = _without_shifts(
        rows, [rows[(group == g) & ~label].mean(axis=0) for g in np.unique(group)]
    )
    within = np.empty_like(rows)
    shifts = []
    for g in np.unique(group):
        for kind in (True, False):
            chosen = (group == g) & (label == kind)
            within[chosen] = rows[chosen] - rows[chosen].mean(axis=0)
        shifts.append(
            rows[(group == g) & label].mean(axis=0) - rows[(group == g) & ~label].mean(axis=0)
        )
    shift = np.mean(shifts, axis=0)
    span = _span(np.concatenate([within, [shift]]))
    inside = within @ span.T
    covariance = inside.T @ inside / len(rows)
    mean_variance = float((within**2).sum()) / len(rows) / rows.shape[1]
    _require_ridge(ridge, mean_variance, where)
    covariance += ridge * mean_variance * np.eye(len(span))
    direction = span.T @ scipy.linalg.solve(covariance, span @ shift, assume_a="pos")
    length = float(np.linalg.norm(direction))
    if length == 0:
        raise MalformedError(
            found="harmful and harmless rows of the same mean",
            expected="a difference to look along",
            where=where,
            remedy="check the labels, or take another site",
        )
    return np.asarray(direction / length)


def _span(rows: Matrix) -> Matrix:
    """Orthonormal rows [r, d] that span the rows [N, d]: found if N < d, else simply everything."""
    if len(rows) >= rows.shape[1]:
        return np.eye(rows.shape[1])
    _, sizes, right = np.linalg.svd(rows, full_matrices=False)
    return np.asarray(right[sizes > sizes[0] * 1e-12])


def _without_shifts(rows: Matrix, means: Sequence[Matrix]) -> Matrix:
    """rows [N, d] without their parts along the differences of the means."""
    differences = np.array(means) - np.mean(means, axis=0)
    _, sizes, right = np.linalg.svd(differences, full_matrices=False)
    along = right[sizes > 1e-9 * max(float(np.abs(rows).max()), 1e-300)]
    return np.asarray(rows - rows @ along.T @ along)


def largest_angle(a: Matrix, b: Matrix) -> float:
    """The largest principal angle in radians between the spans of two orthonormal bases [d, k]."""
    return float(scipy.linalg.subspace_angles(a, b).max())
