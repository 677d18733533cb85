"""What a report is made of, before it is HTML or Markdown: sections of plain text and plots."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Text:
    text: str


@dataclass(frozen=True)
class Items:
    items: Sequence[str]


@dataclass(frozen=True)
class Grid:
    """A table; marked: the rows to point out, by number."""

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    marked: Sequence[int] = ()


@dataclass(frozen=True)
class Picture:
    """svg: an element as `report.inline` leaves it."""

    caption: str
    svg: str


Block = Text | Items | Grid | Picture


@dataclass(frozen=True)
class Section:
    title: str
    blocks: Sequence[Block]


def number(value: float) -> str:
    """A figure as people read it: three places, or three digits where that says nothing."""
    return f"{value:.3f}" if value == 0 or 0.001 <= abs(value) < 1000 else f"{value:.3g}"
