"""Requests drawn as pictures, in the style "cells" (after FigStep, arXiv 2311.05608).

The text is cut into pieces, one token of the language model each; every piece stands in its own
square cell of 48 px, and the cells are filled row by row. A piece that continues a word starts
with "-". With vision patches of 48 px one cell is one image token: a picture costs as many tokens
as its text.

    "Unlock the door"  ->  | Un | -lock | the | door |

The font is the one embedded in Pillow: no font file of the system can change what a model sees.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

from PIL import Image, ImageDraw, ImageFont

from guardbake.errors import EnvironmentFault, UsageError

CELL = 48
"""Side of one cell, in px."""
CONTINUES = "-"
"""What stands before a piece that continues a word."""

_FONT_SIZE = 10
_MARGIN = 3
_LINE_HEIGHT = 14
_LINES = 3
_DROPPED = re.compile(r"[^A-Za-z0-9'\-$%& ]")
_LOOSE_HYPHENS = re.compile(r"-{2,}|(?<![A-Za-z0-9])-|-(?![A-Za-z0-9])")


class Tokenizer(Protocol):
    """A fast tokenizer of transformers, as far as it is needed here."""

    def __call__(
        self, text: str, *, add_special_tokens: bool, return_offsets_mapping: bool
    ) -> Mapping[str, Any]: ...


class Piece(NamedTuple):
    """What stands in one cell, and the token it was cut from."""

    drawn: str
    token: int


def clean(text: str) -> str:
    """Keep letters, digits, ' - $ % & and single spaces; a hyphen stays only inside a word.

    A loose hyphen would be drawn like the mark of a continued word.
    """
    kept = _DROPPED.sub(" ", text.replace("\u2019", "'"))
    return " ".join(_LOOSE_HYPHENS.sub(" ", kept).split())


def cut(text: str, tokenizer: Tokenizer) -> list[Piece]:
    """Clean `text`, tokenise it with a leading space, pair every token with what is drawn for it.

    A token that holds nothing but a space (before a digit, for some tokenizers) takes no cell.
    """
    spaced = " " + clean(text)
    encoded = tokenizer(spaced, add_special_tokens=False, return_offsets_mapping=True)
    pieces = []
    for token, (start, end) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
        letters = spaced[start:end].strip()
        if not letters:
            continue
        first = spaced.index(letters, start)
        mark = "" if spaced[first - 1] == " " else CONTINUES
        pieces.append(Piece(mark + letters, int(token)))
    return pieces


def pieces_of(text: str, tokenizer: Tokenizer) -> list[str]:
    """The pieces of `text` as they are drawn, one token each, in reading order."""
    return [piece.drawn for piece in cut(text, tokenizer)]


def fits(text: str, tokenizer: Tokenizer, columns: int, rows: int) -> bool:
    """Whether `text` can be drawn in a picture of columns x rows cells."""
    pieces = pieces_of(text, tokenizer)
    return len(pieces) <= columns * rows and all(len(_wrap(p)) <= _LINES for p in pieces)


def draw_cells(pieces: Sequence[str], columns: int, rows: int) -> Image.Image:
    """Draw one piece per cell, row by row; the cells that are left stay white.

    Returns an RGB image of columns * 48 by rows * 48 px, black on white.
    Raises UsageError when there are more pieces than cells or a piece is too long for its cell.
    """
    if len(pieces) > columns * rows:
        raise UsageError(
            found=f"{len(pieces)} pieces",
            expected=f"at most {columns * rows} ({columns} x {rows} cells)",
            where="a typographic image",
            remedy="shorten the text; one cell holds one token",
        )
    image = blank(columns, rows)
    for place, piece in enumerate(pieces):
        row, column = divmod(place, columns)
        image.paste(draw_piece(piece), (column * CELL, row * CELL))
    return image


def blank(columns: int, rows: int) -> Image.Image:
    """A white RGB image of columns * 48 by rows * 48 px."""
    return Image.new("RGB", (columns * CELL, rows * CELL), "white")


def draw_piece(piece: str) -> Image.Image:
    """One RGB cell of 48 x 48 px with `piece` in it, wrapped by letters, centred vertically."""
    lines = _wrap(piece)
    if len(lines) > _LINES:
        raise UsageError(
            found=f"a piece of {len(piece)} characters, {len(lines)} lines when wrapped",
            expected=f"at most {_LINES} lines of {CELL - 2 * _MARGIN} px",
            where="a cell of a typographic image",
            remedy="use shorter words",
        )
    image = blank(1, 1)
    pen = ImageDraw.Draw(image)
    top = (CELL - _LINE_HEIGHT * len(lines)) // 2
    for number, line in enumerate(lines):
        pen.text((_MARGIN, top + number * _LINE_HEIGHT), line, font=_font(), fill="black")
    return image


def _wrap(piece: str) -> list[str]:
    """Break `piece` into lines that are no wider than a cell, as late as possible."""
    lines = [""]
    for letter in piece:
        if lines[-1] and _font().getlength(lines[-1] + letter) > CELL - 2 * _MARGIN:
            lines.append("")
        lines[-1] += letter
    return lines


@lru_cache(maxsize=1)
def _font() -> ImageFont.FreeTypeFont:
    """Pillow's embedded outline font, which a build of Pillow without FreeType lacks."""
    font = ImageFont.load_default(_FONT_SIZE)
    if not isinstance(font, ImageFont.FreeTypeFont):
        raise EnvironmentFault(
            found="Pillow without FreeType",
            expected="Pillow with its embedded outline font",
            where="the drawing of typographic images",
            remedy="pip install --force-reinstall pillow",
        )
    return font
