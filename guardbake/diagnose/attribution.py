"""Which tokens of a sample stand for it: CARE's attribution (arXiv 2603.27240), when fitting only.

Most of a prompt's tokens say nothing of its harm, and their mean dilutes it. With D the squared
distances of two sets of tokens and K = exp(-D / median(D > 0)), which is a Gaussian kernel of the
median bandwidth, a token scores::

    an image token  squared norm of its row of K H, K of image against text tokens
    a text token    0.7 mean_j D_ij + 0.3 |(H K H)_ii|, D and K of text against text tokens

H = I - 1 1^T / n takes a mean over the text tokens. The mean of the highest eighth of the image
tokens, or fifth of the text tokens, is the sample's vector. Only rows under a mask are ever read,
so neither padding nor the other modality can move a median or a mean. The two terms of the text
score are added as they are printed; D is in squared units of the activations and outweighs the
kernel's term, which lies in [0, 1], wherever activations are larger than 1.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from guardbake.activations import Rows
from guardbake.covariance import Matrix, finite_rows

Flags = npt.NDArray[np.bool_]

IMAGE_SHARE, TEXT_SHARE = 8, 5  # one token in so many is kept, and never fewer than one
DISTANCE_WEIGHT, KERNEL_WEIGHT = 0.7, 0.3
ROUNDING = 1e-12  # of two squared norms: below it a distance is rounding, and counts as none


def image_vector(tokens: Rows, image: Flags, text: Flags) -> Rows:
    """[d] float32: mean of the image tokens that the text tells apart most.

    tokens [T, d] float32 or wider, at one site; image, text [T] bool, disjoint. NaN if there is no
    image token. Raises MalformedError for rows that are not finite and for fewer than two of text.
    """
    if not image.any():
        return np.full(tokens.shape[1], np.nan, np.float32)
    pictures = finite_rows(tokens[image], "image tokens", 1)
    scores = image_scores(pictures, finite_rows(tokens[text], "text tokens", 2))
    return _mean_of_highest(pictures, scores, IMAGE_SHARE)


def text_vector(tokens: Rows, text: Flags) -> Rows:
    """[d] float32: mean of the text tokens that stand out most.

    tokens [T, d] float32 or wider, at one site; text [T] bool. Raises MalformedError for rows that
    are not finite and for fewer than two of text.
    """
    words = finite_rows(tokens[text], "text tokens", 2)
    return _mean_of_highest(words, text_scores(words), TEXT_SHARE)


def image_scores(pictures: Matrix, words: Matrix) -> Matrix:
    """[n] in [0, 1] for image tokens [n, d] beside text tokens [m, d]; all 0 if they are equal."""
    centred = _kernel(squared_distances(pictures, words))
    centred -= centred.mean(axis=1, keepdims=True)
    strength = (centred**2).sum(axis=1)
    low, high = float(strength.min()), float(strength.max())
    return np.zeros_like(strength) if high == low else (strength - low) / (high - low)


def text_scores(words: Matrix) -> Matrix:
    """[m] from 0 for text tokens [m, d]."""
    distances = squared_distances(words, words)
    kernel = _kernel(distances)
    centred = np.diag(kernel) - 2 * kernel.mean(axis=1) + kernel.mean()
    return np.asarray(DISTANCE_WEIGHT * distances.mean(axis=1) + KERNEL_WEIGHT * np.abs(centred))


def squared_distances(a: Matrix, b: Matrix) -> Matrix:
    """[n, m] of rows [n, d] and [m, d], exactly 0 where two rows are equal."""
    centre = b.mean(axis=0)  # distances do not change, and the numbers they are made of get smaller
    a, b = a - centre, b - centre
    squares = (a**2).sum(axis=1)[:, None] + (b**2).sum(axis=1)
    distances = squares - 2 * a @ b.T
    return np.where(distances > ROUNDING * squares, distances, 0.0)


def _kernel(distances: Matrix) -> Matrix:
    apart = distances[distances > 0]
    return np.exp(-distances / np.median(apart)) if apart.size else np.ones_like(distances)


def _mean_of_highest(rows: Matrix, scores: Matrix, share: int) -> Rows:
    """Ties go to the earlier token."""
    count = max(1, len(rows) // share)
    chosen = np.sort(np.argsort(-scores, kind="stable")[:count])
    return np.asarray(rows[chosen].mean(axis=0), dtype=np.float32)
