"""OR-Bench: benign prompts that models refuse too often (Cui et al., arXiv 2405.20947).

Layout: huggingface.co/datasets/bench-llm/or-bench, three tables with the columns prompt and
category: or-bench-80k.csv and its hard subset or-bench-hard-1k.csv are harmless, or-bench-toxic.csv
is harmful. Parts: the set (hard-1k and toxic, unless named) and the category.
"""

from __future__ import annotations

from pathlib import Path

from guardbake.samples import Label, Prompt
from guardbake.samples.readers.benchmark import Benchmark, Entry, missing
from guardbake.samples.readers.files import malformed, table_of, words_of

SETS: dict[str, Label] = {"80k": "harmless", "hard-1k": "harmless", "toxic": "harmful"}


def _name(subset: str) -> str:
    return f"or-bench-{subset}.csv"


def _read(path: Path) -> list[Entry]:
    if path.is_file():
        tables = {subset: path for subset in SETS if path.name == _name(subset)}
        if not tables:
            expected = ", ".join(_name(subset) for subset in SETS)
            raise malformed(path, "a name that does not tell the set", expected)
    else:
        places = {subset: path / _name(subset) for subset in SETS}
        tables = {subset: place for subset, place in places.items() if place.is_file()}
        if not tables:
            raise missing(path, " and no ".join(_name(subset) for subset in SETS))
    return [entry for subset, table in tables.items() for entry in _entries(subset, table)]


def _entries(subset: str, table: Path) -> list[Entry]:
    entries = []
    for index, row in enumerate(table_of(table, ("prompt", "category"))):
        text = words_of(row, "prompt", table, f"row {index}")
        parts = {"set": subset, "category": words_of(row, "category", table, f"row {index}")}
        entries.append(Entry(Prompt(text, SETS[subset], "", index), parts))
    return entries


OR_BENCH = Benchmark(
    name="OR-Bench",
    home="https://huggingface.co/datasets/bench-llm/or-bench",
    layout=f"a folder with {', '.join(_name(subset) for subset in SETS)}, or one of these files",
    read=_read,
    usual=("hard-1k", "toxic"),
)
