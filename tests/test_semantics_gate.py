"""The law's sensor and gates: whole, chunked, cached and padded runs agree."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import numpy.typing as npt
from hypothesis import given
from hypothesis import strategies as st

from guardbake import semantics as law

Array = npt.NDArray[np.float64]
# float64: a handful of operations on numbers near 1, each with a relative error of 1.1e-16.
NOISE = 1e-12


def test_a_score_opens_above_0_only_and_when_it_is_not_a_number() -> None:
    scores = np.array([-1.0, 0.0, -0.0, 1e-30, np.nan, np.inf, -np.inf])
    assert law.is_open(scores).tolist() == [False, False, False, True, True, True, False]


def test_by_token_only_real_tokens_of_this_call_open() -> None:
    scores = np.array([[1.0, -1.0, np.nan], [1.0, 1.0, 1.0]])
    mask = np.array([[0, 1, 1, 1, 1], [1, 1, 0, 1, 1]])  # two tokens are cached
    opened = law.gate_by_token(scores, mask)
    assert opened.tolist() == [[True, False, True], [False, True, True]]


def padded(scores: list[list[float]], lefts: list[int], width: int) -> tuple[Array, Array]:
    """Rows of scores at column `left` of a batch; padding scores would open, were they read."""
    out, mask = np.full((len(scores), width), np.nan), np.zeros((len(scores), width), np.int64)
    for row, (values, left) in enumerate(zip(scores, lefts, strict=True)):
        out[row, left : left + len(values)] = values
        mask[row, left : left + len(values)] = 1
    return out, mask


def by_hand(scores: list[float], prompt: int) -> tuple[list[bool], int]:
    """The gate of one sequence, token by token, as METHODS 4 says it."""
    verdict = not scores[prompt - 1] <= 0
    return [verdict and i >= prompt - 1 for i in range(len(scores))], 2 if verdict else 1


@st.composite
def mixed_batches(draw: st.DrawFn) -> tuple[list[list[float]], list[int], list[int], list[int]]:
    """(scores, prompt lengths, left paddings, chunk ends) of a batch of mixed lengths."""
    rows = draw(st.integers(1, 4))
    value = st.sampled_from([-2.0, -1.0, 0.0, 1.0, 3.0, np.nan])
    scores = [draw(st.lists(value, min_size=1, max_size=7)) for _ in range(rows)]
    prompts = [draw(st.integers(1, len(row))) for row in scores]
    lefts = [draw(st.integers(0, 4)) for _ in range(rows)]
    width = max(left + len(row) for left, row in zip(lefts, scores, strict=True))
    width += draw(st.integers(0, 2))
    cuts = draw(st.sets(st.integers(1, width), max_size=5))
    return scores, prompts, lefts, sorted(cuts | {width})


def run_in_chunks(
    scores: Array, mask: Array, state: npt.NDArray[np.int64], stops: list[int]
) -> tuple[npt.NDArray[np.bool_], list[npt.NDArray[np.int64]]]:
    opened, states, start = [], [state], 0
    for stop in stops:
        part, after = law.gate_by_sequence(scores[:, start:stop], mask[:, :stop], states[-1])
        opened.append(part)
        states.append(after)
        start = stop
    return np.concatenate(opened, axis=1), states


@given(mixed_batches())
def test_whole_chunked_cached_padded_and_batched_agree(
    case: tuple[list[list[float]], list[int], list[int], list[int]],
) -> None:
    rows, prompts, lefts, stops = case
    scores, mask = padded(rows, lefts, stops[-1])
    start = -np.array(prompts, np.int64)
    whole, after = law.gate_by_sequence(scores, mask, start)
    chunked, states = run_in_chunks(scores, mask, start, stops)
    cached, _ = run_in_chunks(scores, mask, start, list(range(1, stops[-1] + 1)))
    assert (whole == chunked).all()
    assert (whole == cached).all()
    assert (after == states[-1]).all()
    for i, (values, prompt, left) in enumerate(zip(rows, prompts, lefts, strict=True)):
        opened, state = by_hand(values, prompt)
        expected = np.zeros(stops[-1], bool)
        expected[left : left + len(values)] = opened
        assert whole[i].tolist() == expected.tolist()
        assert after[i] == state
        assert not whole[i, : left + prompt - 1].any()  # the prompt's cache is independent
        assert not whole[i][mask[i] == 0].any()


@given(mixed_batches())
def test_the_state_only_goes_up(
    case: tuple[list[list[float]], list[int], list[int], list[int]],
) -> None:
    rows, prompts, lefts, stops = case
    scores, mask = padded(rows, lefts, stops[-1])
    _, states = run_in_chunks(scores, mask, -np.array(prompts, np.int64), stops)
    for before, after in pairwise(states):
        assert (after >= before).all()
        assert (after[before >= law.CLOSED] == before[before >= law.CLOSED]).all()


@given(mixed_batches())
def test_a_state_of_0_decides_at_the_end_of_the_call(
    case: tuple[list[list[float]], list[int], list[int], list[int]],
) -> None:
    rows, _, lefts, stops = case
    scores, mask = padded(rows, lefts, stops[-1])
    ends = np.array([len(row) for row in rows], np.int64)
    zero = law.gate_by_sequence(scores, mask, np.zeros_like(ends))
    told = law.gate_by_sequence(scores, mask, -ends)
    assert (zero[0] == told[0]).all()
    assert (zero[1] == told[1]).all()


def test_a_decided_state_ignores_later_scores() -> None:
    scores, mask = np.array([[5.0, 5.0], [-5.0, -5.0]]), np.ones((2, 4), np.int64)
    opened, state = law.gate_by_sequence(scores, mask, np.array([law.CLOSED, law.OPEN]))
    assert opened.tolist() == [[False, False], [True, True]]
    assert state.tolist() == [law.CLOSED, law.OPEN]


def test_a_prompt_whose_end_was_missed_opens() -> None:
    """Four tokens are cached; the first row's end, 3, is among them and was never asked."""
    scores, mask = np.full((3, 2), -1.0), np.ones((3, 6), np.int64)
    opened, state = law.gate_by_sequence(scores, mask, np.array([-3, -5, -7]))
    assert opened.tolist() == [[True, True], [False, False], [False, False]]
    assert state.tolist() == [law.OPEN, law.CLOSED, -7]


def test_a_row_of_padding_stays_undecided() -> None:
    opened, state = law.gate_by_sequence(
        np.ones((2, 2)), np.zeros((2, 2), np.int64), np.array([0, -3])
    )
    assert not opened.any()
    assert state.tolist() == [0, -3]
