"""FigStep's SafeBench: requests drawn as a numbered list to be filled in (arXiv 2311.05608).

Layout: github.com/ThuCCSLab/FigStep, with data/question/safebench.csv (500 rows) and its sample
SafeBench-Tiny.csv (50), columns category_id, task_id, category_name, question, instruction; and the
pictures data/images/<SafeBench or SafeBench-Tiny>/query_ForbidQI_<category_id>_<task_id>_6.png.
Those of SafeBench come as data/images/SafeBench/screenshots.zip, to be unpacked in that folder.

One text is asked beside every picture. It is the authors' and is read from where they print it: the
first fenced block under the heading "FigStep" in README.md of the repository.
Family: figstep. Parts: set (SafeBench, unless named), topic.
"""

from __future__ import annotations

import re
from pathlib import Path

from guardbake.samples import Prompt
from guardbake.samples.readers.benchmark import Benchmark, Entry, missing
from guardbake.samples.readers.files import Row, inside, malformed, table_of, text_of, words_of

SETS = {"SafeBench": "safebench.csv", "SafeBench-Tiny": "SafeBench-Tiny.csv"}
COLUMNS = ("category_id", "task_id", "category_name", "question")
_HEADING = re.compile(r"^#+[\d. ]+FigStep\s*$")
_FENCE = "```"


def _read(path: Path) -> list[Entry]:
    places = {name: path / "data" / "question" / file for name, file in SETS.items()}
    tables = {name: place for name, place in places.items() if place.is_file()}
    if not tables:
        raise missing(path, "data/question/safebench.csv")
    asked = _text_prompt(path)
    return [
        _entry(row, index, name, tables[name], asked)
        for name in tables
        for index, row in enumerate(table_of(tables[name], COLUMNS))
    ]


def _entry(row: Row, index: int, subset: str, table: Path, asked: str) -> Entry:
    place = f"row {index}"
    category, task = (words_of(row, key, table, place) for key in ("category_id", "task_id"))
    picture = f"images/{subset}/query_ForbidQI_{category}_{task}_6.png"
    prompt = Prompt(
        asked,
        "harmful",
        "",
        index,
        image=inside(table.parent.parent, picture, f"{table.name} {place}"),
        family="figstep",
        goal=words_of(row, "question", table, place),
    )
    return Entry(prompt, {"set": subset, "topic": words_of(row, "category_name", table, place)})


def _text_prompt(path: Path) -> str:
    """What is asked beside every picture, from the repository's README.md."""
    readme = path / "README.md"
    if not readme.is_file():
        raise missing(path, "README.md, in which the text prompt is printed")
    lines = iter(text_of(readme).splitlines())
    if any(_HEADING.match(line) for line in lines) and any(_FENCE in line for line in lines):
        block = []
        for line in lines:
            if _FENCE in line:
                break
            block.append(line.strip())
        if text := " ".join(block).strip():
            return text
    raise malformed(readme, 'no block under a heading "FigStep"', "the README of the repository")


FIGSTEP = Benchmark(
    name="FigStep SafeBench",
    home="https://github.com/ThuCCSLab/FigStep",
    layout="the repository's folder, with README.md, data/question/safebench.csv and the unpacked "
    "data/images/SafeBench/query_ForbidQI_<category>_<task>_6.png",
    read=_read,
    usual=("SafeBench",),
)
