"""Plain lists of prompts: text, one a line, or JSONL."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from guardbake.errors import RecipeError
from guardbake.samples import Label, Prompt
from guardbake.samples.readers.files import malformed, text_of, words_of


def from_file(path: Path, label: Label, source: str) -> list[Prompt]:
    """Prompts of a list: JSONL with {"prompt": str} a line if the suffix is .jsonl, else text.

    Text: one prompt a line; blank lines and lines that begin with '#' are skipped. A JSONL row may
    carry "label", which must then be the label asked for. Raises RecipeError if there is no such
    file, MalformedError if it is not UTF-8, holds no prompt or a row has no prompt.
    """
    if not path.is_file():
        raise RecipeError(
            found="no file",
            expected="a text or JSONL list of prompts",
            where=f"source {source!r}: {path}",
            remedy="correct the path; it is taken from the folder of the recipe's root",
        )
    texts = rows_of_jsonl(path, label) if path.suffix == ".jsonl" else lines_of(path)
    return numbered(path, texts, label, source)


def lines_of(path: Path) -> list[str]:
    """The lines of a text that hold something and are no comment, stripped."""
    lines = [line.strip() for line in text_of(path).splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def rows_of_jsonl(path: Path, label: Label) -> list[str]:
    """The prompts of a JSONL file, after checking that no row has another label."""
    texts = []
    for number, line in enumerate(text_of(path).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, RecursionError):
            raise malformed(path, f"line {number} that is not JSON", "one object a line") from None
        if not isinstance(row, dict):
            raise malformed(path, f"line {number} that is no object", '{"prompt": str} a line')
        if row.get("label", label) != label:
            raise malformed(path, f"line {number} with another label", f'"label": "{label}"')
        texts.append(words_of(row, "prompt", path, f"line {number}"))
    return texts


def numbered(path: Path, texts: Sequence[str], label: Label, source: str) -> list[Prompt]:
    """Prompts in the order of the file. Raises MalformedError if there is none."""
    if not texts:
        raise malformed(path, "no prompt at all", "at least one prompt")
    return [Prompt(text, label, source, index) for index, text in enumerate(texts)]
