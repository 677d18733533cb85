"""Blocks as Markdown: every string is shown as it is, whatever it would mean there."""

from __future__ import annotations

import re
from collections.abc import Sequence

from guardbake.report.blocks import Grid, Items, Picture, Section, Text

# What Markdown (and the HTML inside it) would read as more than a character.
_MARKUP = re.compile(r"([\\`*_\[<>|#~&$])")


def to_markdown(title: str, summary: Sequence[str], sections: Sequence[Section]) -> str:
    """The same without plots, for a model card: headings, text and tables."""
    lines = [f"# {plain(title)}", ""]
    lines += [line for one in summary for line in (f"**{plain(one)}**", "")]
    for section in sections:
        blocks = [block for block in section.blocks if not isinstance(block, Picture)]
        if blocks:
            lines += [f"## {plain(section.title)}", ""]
        for block in blocks:
            lines += [*to_lines(block), ""]
    return "\n".join(lines).rstrip() + "\n"


def to_lines(block: Text | Items | Grid) -> list[str]:
    """One block, without a line after it."""
    if isinstance(block, Text):
        return [plain(block.text)]
    if isinstance(block, Items):
        return [f"- {plain(item)}" for item in block.items]
    lines = [plain(block.caption), "", _line(block.head), "|---" * len(block.head) + "|"]
    for number, row in enumerate(block.rows):
        cells = [plain(cell) for cell in row]
        if number in block.marked:
            cells[0] = f"**{cells[0]}**"
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _line(names: Sequence[str]) -> str:
    return f"| {' | '.join(plain(name) for name in names)} |"


def plain(text: str) -> str:
    """Text that Markdown shows as it is, on one line."""
    return _MARKUP.sub(r"\\\1", " ".join(text.split()))
