"""The words of a trace: which ablations there are, roles, relative positions, donors, openings."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from guardbake.diagnose.ablation import (
    ROLES,
    Ablation,
    ablations,
    choose_donors,
    roles,
    same_place,
)
from guardbake.diagnose.openings import openings_of
from guardbake.errors import RecipeError

FLAGS = st.lists(st.booleans(), min_size=2, max_size=20)


def flags(*runs: int) -> np.ndarray:
    """Runs of text and image tokens in turn, text first."""
    return np.concatenate([np.full(n, bool(i % 2)) for i, n in enumerate(runs)])


def test_every_ablation_comes_once_and_pairs_are_skipped() -> None:
    found = list(ablations(4, ("pair", "ffn"), ("resample", "skip", "skip")))
    assert len(found) == len(set(found)) == 2 * 4 + 3
    assert {a.kind for a in found if a.part == "pair"} == {"skip"}
    assert found[0] == Ablation(0, "ffn", "resample")
    pair = found[-1]
    assert (pair.layer, pair.last_layer) == (2, 3)
    assert found[0].last_layer == 0


def test_zero_is_computed_as_skip() -> None:
    assert Ablation(1, "ffn", "zero").computed_as == Ablation(1, "ffn", "skip")
    assert Ablation(1, "ffn", "mean").computed_as == Ablation(1, "ffn", "mean")


def test_roles() -> None:
    found = [ROLES[role] for role in roles(flags(2, 3, 2))]
    assert found == ["first", "text", "image", "image", "image", "text", "last"]


@given(FLAGS, FLAGS)
def test_places_lie_in_the_donor_in_order_and_keep_both_ends(a: list[bool], b: list[bool]) -> None:
    place = same_place(np.array(a), np.array(b))
    assert len(place) == len(a)
    assert place[0] == 0
    assert (np.diff(place) >= 0).all()
    assert place.max() < len(b)
    runs = [int(np.count_nonzero(np.diff(x))) for x in (a, b)]
    if runs[0] == runs[1] and a[0] == b[0]:
        assert (np.array(b)[place] == np.array(a)).all()  # text from text, image from image
    else:
        assert place[-1] == len(b) - 1


@given(FLAGS)
def test_a_prompt_is_its_own_place(a: list[bool]) -> None:
    assert same_place(np.array(a), np.array(a)).tolist() == list(range(len(a)))


def test_places_are_relative_within_their_run() -> None:
    place = same_place(flags(3, 4, 3), flags(5, 4, 2))
    assert place.tolist() == [0, 2, 4, 5, 6, 7, 8, 9, 9, 10]


def test_donors_are_near_in_length_seeded_and_not_always_the_same() -> None:
    candidates = list(range(10, 50))
    chosen = choose_donors([30] * 40, candidates, 0)
    assert chosen == choose_donors([30] * 40, candidates, 0)
    assert chosen != choose_donors([30] * 40, candidates, 1)
    assert len(set(chosen)) > 3
    assert max(abs(candidates[i] - 30) for i in chosen) <= 5
    assert choose_donors([7], [99], 0) == [0]


@dataclass
class Letters:
    """A tokenizer: one token a letter."""

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        assert not add_special_tokens
        return {"input_ids": [ord(letter) for letter in text]}


def words(openings: tuple[tuple[int, ...], ...]) -> list[str]:
    return ["".join(map(chr, opening)) for opening in openings]


def test_openings_are_cut_and_each_probability_counts_once() -> None:
    found = openings_of(Letters(), ["nope", "no", "never"], ["yes", "yet"], 3)
    assert words(found.refusing) == ["nev", "no"]  # P("nop") is part of P("no")
    assert words(found.compliant) == ["yes", "yet"]
    assert words(found.nodes) == ["n", "y", "ne", "ye"]
    assert openings_of(Letters(), ["no"], ["yes"], 1).nodes == ()


@pytest.mark.parametrize(("refusing", "compliant"), [("no", "not"), ("nothing", "no"), ("a", "a")])
def test_sides_that_open_alike_are_refused(refusing: str, compliant: str) -> None:
    with pytest.raises(RecipeError, match=r"diagnose\.opening"):
        openings_of(Letters(), [refusing], [compliant], 4)
    with pytest.raises(RecipeError):
        openings_of(Letters(), ["never"], ["no"], 1)
