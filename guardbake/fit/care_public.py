"""CARE's subspace as the public code computes it, so that the difference to ours can be shown.

Kept as it is there (arXiv 2603.27240, METHODS 2): each covariance about its own mean, so that a
shift between the means does not count; an absolute ridge of 1e-6 on the benign covariance alone;
the matrix C_b^-1/2 C_m C_b^-1/2, whose top eigenvectors are mapped back and scaled to unit length
one by one. The columns U are not orthogonal, and U U^T, which the public code applies, is no
projection. Not kept: float16 inputs, and square roots and inverses of d x d matrices. U spans what
the generalised eigenvectors of (C_m, C_b + 1e-6 I) span, column by column, and those follow from
the samples' inner products.

The law wants an orthonormal basis: with U = Q S W^T, U U^T is Q S^2 Q^T, a basis with gains.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from guardbake.covariance import Matrix, finite_rows
from guardbake.fit.subspace import generalised_eigenvectors

RIDGE = 1e-6


@dataclass(frozen=True, eq=False)
class PublicSubspace:
    """basis [d, k] float64, orthonormal; gains [k] float64, largest first; centre [d].

    basis @ diag(gains) @ basis.T is U U^T of the public code. spectrum [k]: eigenvalues of the
    columns of U, largest first; they do not belong to the basis column by column.
    """

    basis: Matrix
    gains: Matrix
    centre: Matrix
    spectrum: Matrix


def public_subspace(malicious: npt.ArrayLike, benign: npt.ArrayLike, rank: int) -> PublicSubspace:
    """malicious [N, d] with N > rank, benign [M, d], float32 or wider, at the edited site.

    Raises MalformedError for rows that are too few, not finite or in float16. Counts divide the
    covariances; N - 1 would change the eigenvalues and, within 1e-6 of the ridge, nothing else.
    """
    where = "discriminative subspace, as the public code"
    bad, good = finite_rows(malicious, where, rank + 1), finite_rows(benign, where, 2)
    centre = good.mean(axis=0)
    bad -= bad.mean(axis=0)
    good -= centre
    values, vectors = generalised_eigenvectors(bad, good, RIDGE, rank, where)
    columns = vectors / np.linalg.norm(vectors, axis=0)
    basis, sizes, _ = np.linalg.svd(columns, full_matrices=False)
    largest = basis[np.abs(basis).argmax(axis=0), np.arange(rank)]
    return PublicSubspace(basis * np.where(largest < 0, -1.0, 1.0), sizes**2, centre, values)
