"""The law of the sensor: readings add up, image tokens are averaged, a lost memory opens."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from guardbake import semantics as law

NOISE = 1e-12  # float64, a few operations on numbers near 1


def reading(directions: np.ndarray, centre: np.ndarray) -> SimpleNamespace:
    return SimpleNamespace(directions=directions, centre=centre)


def test_score_is_the_signed_distance_beyond_the_threshold() -> None:
    one = reading(np.array([[0.6], [0.8]]), np.array([1.0, 1.0]))
    x = np.array([[[1.0, 1.0], [1.6, 1.8], [0.4, 0.2]]])
    assert np.abs(law.score(law.features([x], [one]), [0.25]) - [[-0.25, 0.75, -1.25]]).max() < (
        NOISE
    )
    small = reading(one.directions.astype(np.float32), one.centre.astype(np.float32))
    assert law.score(law.features([x.astype(np.float32)], [small]), [0.25]).dtype == np.float32


def test_readings_add_up() -> None:
    rng = np.random.default_rng(0)
    xs = rng.standard_normal((3, 2, 4, 5))
    parts = [reading(rng.standard_normal((5, 3)), rng.standard_normal(5)) for _ in xs]
    alone = [law.features([x], [part]) for x, part in zip(xs, parts, strict=True)]
    assert np.abs(law.features(list(xs), parts) - sum(alone)).max() < NOISE


# f [2, 4, 2]: columns last, pooled. Row 0 has images at 1 and 2, row 1 one in the padding alone.
FEATURES = np.array(
    [
        [[1.0, 9.0], [1.0, 2.0], [1.0, 4.0], [1.0, 9.0]],
        [[1.0, 9.0], [2.0, 9.0], [3.0, 9.0], [4.0, 9.0]],
    ]
)
PICTURES = np.array([[False, True, True, False], [True, False, False, False]])
MASK = np.array([[1, 1, 1, 1], [0, 1, 1, 1]])
LIMITS = (0.5, 0.25, 0.25)


def test_a_pooled_score_averages_the_image_tokens_so_far() -> None:
    scores, memory = law.pooled_score(FEATURES, LIMITS, MASK, PICTURES, np.zeros((2, 3)))
    assert scores[0].tolist() == [0.5, 2.75, 3.75, 3.75]  # no image yet, then means 2, 3, 3
    assert scores[1, 1:].tolist() == [1.5, 2.5, 3.5]  # what looks like an image is padding
    assert memory.tolist() == [[6.0, 2.0, 4.0], [0.0, 0.0, 3.0]]


def test_image_tokens_accuse_and_never_acquit() -> None:
    """Row 0's last two tokens: the pooled mean is 3, its own threshold further and further off."""
    for limit, expected in ((0.25, 3.75), (2.0, 2.0), (3.25, 0.75), (30.0, 0.75)):
        limits = (0.5, 0.25, limit)
        scores, _ = law.pooled_score(FEATURES, limits, MASK, PICTURES, np.zeros((2, 3)))
        assert scores[0, 2:].tolist() == [expected, expected]


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_a_pooled_score_in_chunks_is_the_whole_one_s(cut: int) -> None:
    whole, after = law.pooled_score(FEATURES, LIMITS, MASK, PICTURES, np.zeros((2, 3)))
    first, memory = law.pooled_score(
        FEATURES[:, :cut], LIMITS, MASK[:, :cut], PICTURES[:, :cut], np.zeros((2, 3))
    )
    rest, end = law.pooled_score(FEATURES[:, cut:], LIMITS, MASK, PICTURES[:, cut:], memory)
    assert np.concatenate([first, rest], axis=1).tolist() == whole.tolist()
    assert end.tolist() == after.tolist()


def test_an_undecided_prompt_whose_memory_was_lost_opens() -> None:
    """The caller fed two tokens before and brings an empty memory; a decided row needs none."""
    scores, mask = np.full((3, 2), -1.0), np.ones((3, 4), int)
    memory = np.array([[0.0, 0.0, 0.0], [0.0, 0.0, 2.0], [0.0, 0.0, 0.0]])
    state = np.array([-4, -4, law.CLOSED])
    opened, after = law.gate_by_sequence(scores, mask, state, memory)
    assert after.tolist() == [law.OPEN, law.CLOSED, law.CLOSED]
    assert opened.tolist() == [[True, True], [False, False], [False, False]]


def test_a_pooled_score_that_is_not_a_number_stays_one() -> None:
    """So that the gate opens on it, also when the image token lies far back."""
    broken = FEATURES.copy()
    broken[0, 1, law.POOLED] = np.nan
    scores, _ = law.pooled_score(broken, LIMITS, MASK, PICTURES, np.zeros((2, 3)))
    assert np.isnan(scores[0, -1])
