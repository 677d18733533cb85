"""Attribution is what METHODS 2 writes, and nothing outside the spans is ever read."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from guardbake.diagnose.attribution import (
    image_scores,
    image_vector,
    squared_distances,
    text_scores,
    text_vector,
)
from guardbake.errors import MalformedError

Matrix = npt.NDArray[np.float64]
SEEDS = st.integers(0, 2**32 - 1)
SPANS = np.array([False] + [True] * 24 + [False] * 15)  # first token, 24 of image, 15 of text
WORDS = np.array([False] * 25 + [True] * 15)


def tokens(seed: int, count: int = 40, width: int = 6) -> Matrix:
    return np.random.default_rng(seed).standard_normal((count, width))


# ---- the definition, written out loop by loop


def distance(a: Matrix, b: Matrix) -> Matrix:
    return np.array([[sum((x - y) ** 2 for x, y in zip(p, q, strict=True)) for q in b] for p in a])


def kernel(d: Matrix) -> Matrix:
    return np.exp(-d / np.median([x for row in d for x in row if x > 0]))


def centring(n: int) -> Matrix:
    return np.eye(n) - np.ones((n, n)) / n


@given(SEEDS)
def test_image_tokens_score_as_printed(seed: int) -> None:
    pictures, words = tokens(seed, 11), tokens(seed + 1, 5)
    rows = kernel(distance(pictures, words)) @ centring(5)
    strength = np.array([row @ row for row in rows])
    expected = (strength - strength.min()) / (strength.max() - strength.min())
    assert np.abs(image_scores(pictures, words) - expected).max() < 1e-9


@given(SEEDS)
def test_text_tokens_score_as_printed(seed: int) -> None:
    words = tokens(seed, 9)
    d = distance(words, words)
    centred = centring(9) @ kernel(d) @ centring(9)
    expected = 0.7 * d.mean(axis=1) + 0.3 * np.abs(np.diag(centred))
    assert np.abs(text_scores(words) - expected).max() < 1e-9


def test_the_vectors_are_means_of_an_eighth_and_a_fifth() -> None:
    rows = tokens(3)
    scores = image_scores(rows[SPANS], rows[WORDS])
    chosen = np.argsort(-scores)[:3]  # 24 // 8
    assert np.allclose(image_vector(rows, SPANS, WORDS), rows[SPANS][chosen].mean(axis=0))
    chosen = np.argsort(-text_scores(rows[WORDS]))[:3]  # 15 // 5
    assert np.allclose(text_vector(rows, WORDS), rows[WORDS][chosen].mean(axis=0))


def test_fewer_tokens_than_the_share_leave_one() -> None:
    rows = tokens(3, 7)
    image = np.array([True] * 3 + [False] * 4)
    assert (image_vector(rows, image, ~image) == rows.astype(np.float32)).all(axis=1).sum() == 1
    assert (text_vector(rows, ~image) == rows.astype(np.float32)).all(axis=1).sum() == 1


def test_equal_tokens_are_no_error_and_go_to_the_first() -> None:
    rows = np.tile(np.arange(6.0) * 1e3 + 1 / 3, (40, 1))
    assert (squared_distances(rows, rows) == 0).all()
    assert (image_scores(rows[SPANS], rows[WORDS]) == 0).all()
    assert np.array_equal(image_vector(rows, SPANS, WORDS), rows[0].astype(np.float32))
    assert np.array_equal(text_vector(rows, WORDS), rows[0].astype(np.float32))


def test_a_token_that_stands_out_is_found() -> None:
    rows = tokens(5)
    rows[30] += 40
    assert np.abs(text_vector(rows, WORDS) - rows[WORDS].mean(axis=0)).max() > 5
    # an image token beside one text token: near it, and far from the others
    rows = np.concatenate([np.zeros((16, 6)), 10 * np.eye(6)])
    rows[4] = rows[16]
    image = np.arange(22) < 16
    assert int(image_scores(rows[image], rows[~image]).argmax()) == 4


# ---- padding


@pytest.mark.parametrize("junk", [0.0, 1e4, np.nan, np.inf])
def test_padding_in_the_text_span_changes_nothing(junk: float) -> None:
    """The public code lets padding into the median and the means; here it cannot be read."""
    rows = tokens(8)
    padded = np.insert(rows, [27, 27, 33, 40], junk, axis=0)
    image, words = (np.insert(mask, [27, 27, 33, 40], False) for mask in (SPANS, WORDS))
    assert np.array_equal(image_vector(padded, image, words), image_vector(rows, SPANS, WORDS))
    assert np.array_equal(text_vector(padded, words), text_vector(rows, WORDS))


def test_the_padding_test_is_not_blind() -> None:
    """Let into the masks, the same padding does change both vectors."""
    rows = tokens(8)
    padded = np.insert(rows, [27] * 30, 0.0, axis=0)
    image, words = np.insert(SPANS, [27] * 30, False), np.insert(WORDS, [27] * 30, True)
    assert not np.allclose(image_vector(padded, image, words), image_vector(rows, SPANS, WORDS))
    assert not np.allclose(text_vector(padded, words), text_vector(rows, WORDS))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_changes_nothing(side: str) -> None:
    rows = tokens(9)
    width = ((5, 0) if side == "left" else (0, 5), (0, 0))
    padded = np.pad(rows, width, constant_values=7.0)
    image, words = (np.pad(mask, width[0]) for mask in (SPANS, WORDS))
    assert np.array_equal(image_vector(padded, image, words), image_vector(rows, SPANS, WORDS))
    assert np.array_equal(text_vector(padded, words), text_vector(rows, WORDS))


# ---- refusals


def test_no_image_leaves_nan_as_the_mean_does() -> None:
    assert np.isnan(image_vector(tokens(1), np.zeros(40, bool), WORDS)).all()


def test_rows_that_are_not_finite_are_refused() -> None:
    rows = tokens(1)
    rows[30, 2] = np.nan
    for call in (lambda: image_vector(rows, SPANS, WORDS), lambda: text_vector(rows, WORDS)):
        with pytest.raises(MalformedError, match="finite") as caught:
            call()
        assert caught.value.exit_code == 9


@pytest.mark.parametrize("count", [0, 1])
def test_a_single_text_token_is_refused(count: int) -> None:
    """One token has no distance to another, and K H is zero."""
    words = np.arange(40) >= 40 - count
    for call in (
        lambda: image_vector(tokens(1), SPANS, words),
        lambda: text_vector(tokens(1), words),
    ):
        with pytest.raises(MalformedError, match="at least 2"):
            call()


@given(SEEDS)
def test_where_the_rows_lie_does_not_matter(seed: int) -> None:
    """Distances alone count: a shift far from the origin chooses the same tokens."""
    rows = tokens(seed)
    moved = image_scores(rows[SPANS] + 1e4, rows[WORDS] + 1e4)
    # distances of 12 from squares of 6e8 lose nothing to centring but the shift's own rounding
    assert np.abs(moved - image_scores(rows[SPANS], rows[WORDS])).max() < 1e-9
