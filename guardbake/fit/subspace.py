"""Subspaces of activations in float64: safety directions and discriminative subspaces.

With a few hundred samples in a few thousand dimensions no d x d matrix is needed: every solution
follows exactly from the samples' inner products.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import scipy.linalg

from guardbake.covariance import Matrix, Ridge, finite_rows, shrunken, solve_shrunken
from guardbake.errors import MalformedError

ORTHONORMAL = 1e-10
SPANNED = 1e-12  # of the largest squared singular value: above the rounding of a Gram matrix


@dataclass(frozen=True, eq=False)
class Subspace:
    """basis [d, k] float64, orthonormal; centre [d]; spectrum [k], largest first."""

    basis: Matrix
    centre: Matrix
    spectrum: Matrix


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
    a, b = finite_rows(harmful, where, rank), finite_rows(harmless, where, rank)
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
        finite_rows(harmful, where, 2).mean(axis=0) - finite_rows(harmless, where, 2).mean(axis=0)
    )


def discriminative_subspace(
    malicious: npt.ArrayLike, benign: npt.ArrayLike, rank: int, ridge: Ridge
) -> Subspace:
    """Directions with most malicious second moment per benign variance (CARE, arXiv 2603.27240).

    malicious [N, d], benign [M, d]. Generalised eigenvectors of (C_m, C_b + e I): C_m about the
    benign mean, so that the mean shift counts; C_b the benign covariance; e = ridge * tr(C_b) / d,
    or Ledoit-Wolf's shrinkage of C_b. The basis is orthonormalised by QR in order.
    """
    where = "discriminative subspace"
    bad, good = finite_rows(malicious, where, rank), finite_rows(benign, where, 2)
    centre = good.mean(axis=0)
    bad -= centre
    good -= centre
    kept, added = shrunken(good, ridge, where)
    values, vectors = generalised_eigenvectors(bad, np.sqrt(kept) * good, added, rank, where)
    return Subspace(_orthonormal(vectors), centre, values)


def generalised_eigenvectors(
    bad: Matrix, good: Matrix, added: float, rank: int, where: str
) -> tuple[Matrix, Matrix]:
    """The `rank` largest of C_m x = lambda (C_b + added I) x: lambda [k], x [d, k] of any length.

    bad [N, d] and good [M, d] are centred already; C = rows^T rows / count. With fewer samples than
    dimensions no d x d matrix is formed: an eigenvector of an eigenvalue above zero is
    x = (C_b + added I)^-1 bad^T u, the inverse is Woodbury's and needs the Gram matrices alone, and
    u is an ordinary eigenvector of N x N numbers. Raises MalformedError (where) if the malicious
    rows do not span `rank` dimensions, or if nothing is added to C_b.
    """
    if not added > 0:
        raise MalformedError(
            found=f"{added} added to the benign covariance of {len(good)} rows",
            expected="a ridge above zero",
            where=where,
            remedy="give a ridge such as 0.1: these rows leave Ledoit-Wolf nothing to shrink by",
        )
    count, width = bad.shape
    good = good / np.sqrt(len(good))
    small = max(count, len(good)) < width
    moment = bad @ bad.T if small else bad.T @ bad
    sizes = np.linalg.eigvalsh(moment)
    spans = int((sizes > SPANNED * sizes[-1]).sum()) if sizes[-1] > 0 else 0
    if rank > spans:
        raise MalformedError(
            found=f"rank {rank} asked of malicious samples that span {spans}",
            expected="a rank within the span",
            where=where,
            remedy="lower the rank or give more samples",
        )
    top = (len(sizes) - rank, len(sizes) - 1)
    if not small:
        covariance = good.T @ good + added * np.eye(width)
        values, vectors = scipy.linalg.eigh(moment / count, covariance, subset_by_index=top)
        return values[::-1], vectors[:, ::-1]
    lower = scipy.linalg.cholesky(good @ good.T + added * np.eye(len(good)), lower=True)
    shared = scipy.linalg.solve_triangular(lower, good @ bad.T, lower=True)
    values, u = scipy.linalg.eigh(moment - shared.T @ shared, subset_by_index=top)
    u = u[:, ::-1]
    inside = scipy.linalg.solve_triangular(lower, shared @ u, lower=True, trans="T")
    return values[::-1] / (count * added), bad.T @ u - good.T @ inside


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
    bad, good = finite_rows(harmful, where, 2), finite_rows(harmless, where, 2)
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
    direction = solve_shrunken(within, ridge, shift[:, None], where)[:, 0]
    length = float(np.linalg.norm(direction))
    if length == 0:
        raise MalformedError(
            found="harmful and harmless rows of the same mean",
            expected="a difference to look along",
            where=where,
            remedy="check the labels, or take another site",
        )
    return np.asarray(direction / length)


def _without_shifts(rows: Matrix, means: Sequence[Matrix]) -> Matrix:
    """rows [N, d] without their parts along the differences of the means."""
    differences = np.array(means) - np.mean(means, axis=0)
    _, sizes, right = np.linalg.svd(differences, full_matrices=False)
    along = right[sizes > 1e-9 * max(float(np.abs(rows).max()), 1e-300)]
    return np.asarray(rows - rows @ along.T @ along)


def largest_angle(a: Matrix, b: Matrix) -> float:
    """The largest principal angle in radians between the spans of two orthonormal bases [d, k]."""
    return float(scipy.linalg.subspace_angles(a, b).max())
