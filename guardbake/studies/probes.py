"""Probes of two kinds, fitted in closed form: ridge regression on +-1, linear or with a kernel.

Both are kernel ridge regression (Saunders et al. 1998), so that only the kernel differs. The ridge,
and the kernel's width, are chosen by leave-one-out error on the rows that are fitted on, which is
exact from one solve: the residual of row i left out is r_i / (1 - H_ii).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import scipy.linalg
from scipy.spatial.distance import cdist

from guardbake.covariance import Matrix

Flags = npt.NDArray[np.bool_]
Kernel = Callable[[Matrix, Matrix], Matrix]
_RIDGES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)  # times the mean of the kernel's diagonal
_WIDTHS = (0.5, 1.0, 2.0, 4.0)  # times the median distance


def linear_kernels(rows: Matrix) -> list[Kernel]:
    """The one linear kernel, about the rows' mean."""
    mean = rows.mean(axis=0)
    return [lambda a, b: (a - mean) @ (b - mean).T]


def gaussian_kernels(rows: Matrix) -> list[Kernel]:
    """exp(-|a - b|^2 / (2 w^2)) for widths about the median distance of the rows."""
    median = float(np.median(cdist(rows, rows)[np.triu_indices(len(rows), 1)])) or 1.0

    def of(width: float) -> Kernel:
        return lambda a, b: np.asarray(np.exp(-cdist(a, b, "sqeuclidean") / (2 * width**2)))

    return [of(scale * median) for scale in _WIDTHS]


def cross_fitted(
    rows: Matrix,
    harmful: Flags,
    fold: npt.NDArray[np.int64],
    kernels: Callable[[Matrix], Sequence[Kernel]],
) -> Matrix:
    """[N] scores of rows [N, d], larger on harmful, each from the folds it is not in."""
    scores = np.empty(len(rows))
    for held in np.unique(fold):
        own = fold != held
        scores[~own] = _probe(rows[own], harmful[own], kernels(rows[own]))(rows[~own])
    return scores


def _probe(rows: Matrix, harmful: Flags, kernels: Sequence[Kernel]) -> Callable[[Matrix], Matrix]:
    target = np.where(harmful, 1.0, -1.0)
    middle = float(target.mean())
    best: tuple[float, Kernel, Matrix] | None = None
    for kernel in kernels:
        values, vectors = scipy.linalg.eigh(kernel(rows, rows))
        inside = vectors.T @ (target - middle)
        for ridge in _RIDGES:
            shrunk = 1 / (np.maximum(values, 0) + ridge * float(np.abs(values).mean()))
            weights = vectors @ (shrunk * inside)
            # r_i = c y_i's part; the residual left out is weights_i / (K + cI)^-1_ii
            left_out = weights / (vectors**2 @ shrunk)
            error = float((left_out**2).mean())
            if best is None or error < best[0]:
                best = error, kernel, weights
    assert best is not None
    _, chosen, weights = best
    return lambda others: np.asarray(chosen(others, rows) @ weights + middle)


def kernel_components(rows: Matrix, count: int) -> Matrix:
    """[N, count] coordinates along the first kernel principal components (Schoelkopf 1998).

    Gaussian kernel at the median distance, centred in feature space; signs fixed by the largest
    coordinate, which is positive.
    """
    gram = gaussian_kernels(rows)[_WIDTHS.index(1.0)](rows, rows)
    gram = gram - gram.mean(0) - gram.mean(1)[:, None] + gram.mean()
    last = len(rows) - 1
    values, vectors = scipy.linalg.eigh(gram, subset_by_index=(last - count + 1, last))
    found = vectors[:, ::-1] * np.sqrt(np.maximum(values[::-1], 0))
    return signed(found)


def components(rows: Matrix, count: int) -> Matrix:
    """[N, count] coordinates along the first principal components, signs as above."""
    centred = rows - rows.mean(axis=0)
    left, sizes, _ = np.linalg.svd(centred, full_matrices=False)
    return signed(left[:, :count] * sizes[:count])


def signed(points: Matrix) -> Matrix:
    """Columns turned so that the largest entry of each is positive."""
    largest = points[np.abs(points).argmax(axis=0), np.arange(points.shape[1])]
    return np.asarray(points * np.where(largest < 0, -1.0, 1.0))
