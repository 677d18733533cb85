from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from guardbake.errors import UsageError
from guardbake.samples.typography import (
    CELL,
    blank,
    clean,
    cut,
    draw_cells,
    draw_piece,
    fits,
    pieces_of,
)


class FourLetters:
    """Cuts every word into tokens of up to four letters; the first one takes the space along."""

    def __call__(
        self, text: str, *, add_special_tokens: bool, return_offsets_mapping: bool
    ) -> Mapping[str, Any]:
        assert not add_special_tokens
        assert return_offsets_mapping
        spans = [match.span() for match in re.finditer(r" ?[^ ]{1,4}", text)]
        return {"input_ids": list(range(len(spans))), "offset_mapping": spans}


class LoneSpaces(FourLetters):
    """As byte-level tokenizers do before a digit: the space is a token of its own."""

    def __call__(
        self, text: str, *, add_special_tokens: bool, return_offsets_mapping: bool
    ) -> Mapping[str, Any]:
        spans = [match.span() for match in re.finditer(r" |[^ ]", text)]
        return {"input_ids": list(range(len(spans))), "offset_mapping": spans}


def test_cleaning_keeps_what_can_be_drawn() -> None:
    assert clean("Don\u2019t  pay $5 (or 3%) - a well-known R&D \u201ctrick\u201d!") == (
        "Don't pay $5 or 3% a well-known R&D trick"
    )


def test_a_continued_word_is_marked() -> None:
    assert pieces_of("Unlock the door!", FourLetters()) == ["Unlo", "-ck", "the", "door"]


def test_a_repeated_word_keeps_its_marks() -> None:
    assert pieces_of("tomatoes tomatoes", FourLetters()) == ["toma", "-toes"] * 2


def test_a_lone_space_takes_no_cell() -> None:
    pieces = cut("7 42", LoneSpaces())
    assert [piece.drawn for piece in pieces] == ["7", "4", "-2"]
    assert [piece.token for piece in pieces] == [1, 3, 4]


def test_cells_are_filled_row_by_row() -> None:
    image = np.asarray(draw_cells(["a", "b", "c"], 2, 2))
    assert image.shape == (2 * CELL, 2 * CELL, 3)
    cells = [image[:CELL, :CELL], image[:CELL, CELL:], image[CELL:, :CELL], image[CELL:, CELL:]]
    for cell, piece in zip(cells, "abc", strict=False):
        assert np.array_equal(cell, np.asarray(draw_piece(piece)))
    assert (cells[3] == 255).all()


def test_a_piece_stays_off_the_border_of_its_cell() -> None:
    for piece in ["Wwwwwwwwwwwwww", "-jjjgggqqq", "responsibilities", "'s", "$"]:
        cell = np.asarray(draw_piece(piece))
        inner = cell[2:-2, 2:-2]
        assert (inner < 128).any()
        assert (cell < 255).sum() == (inner < 255).sum()


def test_different_pieces_look_different() -> None:
    pieces = ["the", "-the", "The", "then", "l", "I", "1", "-", "--"]
    assert len({draw_piece(piece).tobytes() for piece in pieces}) == len(pieces)


def test_too_much_text_is_refused_with_numbers() -> None:
    with pytest.raises(UsageError, match=r"5 pieces.*at most 4"):
        draw_cells(list("abcde"), 2, 2)
    with pytest.raises(UsageError, match="lines when wrapped"):
        draw_piece("W" * 40)


def test_fits_agrees_with_drawing() -> None:
    assert fits("one two", FourLetters(), 2, 1)
    assert not fits("one two six", FourLetters(), 2, 1)
    assert np.asarray(blank(2, 1)).shape == (CELL, 2 * CELL, 3)
