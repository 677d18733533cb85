"""The law of several gates: one state for all of them, and each gate as if it stood alone."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from hypothesis import given
from hypothesis import strategies as st

from guardbake import semantics as law
from guardbake.spec import MAX_GATES

States = npt.NDArray[np.int64]


def test_of_one_gate_the_state_is_its_own() -> None:
    state = np.array([-7, law.UNDECIDED, law.CLOSED, law.OPEN])
    assert law.own_state(state, 0).tolist() == state.tolist()
    assert law.joint_state([state]).tolist() == state.tolist()


@given(st.lists(st.lists(st.booleans(), min_size=MAX_GATES, max_size=MAX_GATES), min_size=1))
def test_a_decided_state_has_a_bit_a_gate(rows: list[list[bool]]) -> None:
    own = [np.where(column, law.OPEN, law.CLOSED) for column in np.array(rows).T]
    state = law.joint_state(own)
    assert state.tolist() == [1 + sum(2**g for g, bit in enumerate(row) if bit) for row in rows]
    for gate, expected in enumerate(own):
        assert law.own_state(state, gate).tolist() == expected.tolist()


def test_an_undecided_state_is_every_gate_s() -> None:
    state = np.array([-7, law.UNDECIDED])
    own = [law.own_state(state, gate) for gate in range(3)]
    assert [each.tolist() for each in own] == [[-7, 0]] * 3
    assert law.joint_state(own).tolist() == [-7, 0]


def call(
    scores: npt.NDArray[np.float64], mask: States, state: States
) -> tuple[npt.NDArray[np.bool_], States]:
    """Every gate in one call: scores [G, B, S] -> open [G, B, S], state."""
    both = [
        law.gate_by_sequence(own, mask, law.own_state(state, gate))
        for gate, own in enumerate(scores)
    ]
    return np.stack([opened for opened, _ in both]), law.joint_state([after for _, after in both])


@st.composite
def cases(draw: st.DrawFn) -> tuple[npt.NDArray[np.float64], States, States, list[int]]:
    """(scores [G, B, S], mask, state before, chunk ends), left-padded."""
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    gates, batch = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    left = rng.integers(0, 3, batch)
    mask = (np.arange(7) >= left[:, None]).astype(np.int64)
    prompts = rng.integers(1, 8 - left)
    cuts = draw(st.sets(st.integers(1, 7), max_size=4))
    return rng.standard_normal((gates, batch, 7)), mask, -prompts, sorted(cuts | {7})


@given(cases())
def test_chunks_rows_and_single_gates_agree_with_the_whole(
    case: tuple[npt.NDArray[np.float64], States, States, list[int]],
) -> None:
    scores, mask, before, stops = case
    whole, after = call(scores, mask, before)
    parts, state, start = [], before, 0
    for stop in stops:
        opened, state = call(scores[..., start:stop], mask[:, :stop], state)
        parts.append(opened)
        start = stop
    assert (np.concatenate(parts, axis=-1) == whole).all()
    assert (state == after).all()
    for row in range(len(mask)):
        one = np.s_[row : row + 1]
        opened, own = call(scores[:, one], mask[one], before[one])
        assert (opened == whole[:, one]).all()
        assert (own == after[one]).all()
    for gate, own in enumerate(scores):
        opened, verdict = law.gate_by_sequence(own, mask, before)
        assert (opened == whole[gate]).all()
        assert (law.own_state(after, gate) == verdict).all()
    assert (call(scores, mask, after)[1] == after).all()  # decided once


def test_a_missed_end_and_a_lost_memory_open_every_gate() -> None:
    mask, scores = np.ones((2, 6), np.int64), np.full((2, 2), -1.0)
    state, memory = np.array([-3, -9]), np.zeros((2, 3))
    own = [
        law.gate_by_sequence(scores, mask, law.own_state(state, gate), memory) for gate in range(3)
    ]
    assert all(opened.all() for opened, _ in own)
    assert law.joint_state([after for _, after in own]).tolist() == [2**3, 2**3]
