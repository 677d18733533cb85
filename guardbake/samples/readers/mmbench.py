"""MMBench: multiple choice questions about pictures (Liu et al., arXiv 2307.06281).

Layout: github.com/open-compass/MMBench links one TSV a split and language, such as
MMBench_DEV_EN.tsv, in two formats: with a picture in every row, or with one replica a picture and,
in the other rows, the index of the row that has it. Columns: index, question, hint, A to D (or
further), answer, category, image (base64), l2-category, split; the test split has no answers.

CircularEval asks a question as often as it has options, each time with the options shifted; pass k
has the index of the question plus k million. Such passes are one group, right if all are.
Parts: split, category.
"""

from __future__ import annotations

import base64
import binascii
from pathlib import Path

from guardbake.samples.questions import LETTERS, Question, asked_with_options
from guardbake.samples.readers.benchmark import Benchmark, Entry, missing
from guardbake.samples.readers.files import Row, malformed, table_of, words_of

COLUMNS = ("index", "question", "A", "B", "image")
PASS = 1_000_000


def _read(path: Path) -> list[Entry]:
    tables = [path] if path.is_file() else sorted(path.glob("*.tsv"))
    if len(tables) != 1:
        raise missing(path, f"single TSV ({len(tables)} found); name the file")
    (table,) = tables
    rows = table_of(table, COLUMNS, "\t")
    images = {words_of(row, "index", table, f"row {i}"): row["image"] for i, row in enumerate(rows)}
    return [_entry(row, index, images, table) for index, row in enumerate(rows)]


def _entry(row: Row, index: int, images: dict[str, str], table: Path) -> Entry:
    place = f"row {index}"
    options = []
    for letter in LETTERS:
        if not row.get(letter, "").strip():
            break
        options.append(row[letter].strip())
    number = words_of(row, "index", table, place)
    answer = row.get("answer", "").strip()
    if not number.isdecimal() or (answer and answer not in LETTERS[: len(options)]):
        raise malformed(table, f"{place} with an index or an answer out of range", "a number, A-D")
    asked = words_of(row, "question", table, place)
    question = Question(
        asked_with_options(asked, row.get("hint", ""), options, f"{table.name} {place}"),
        "harmless",
        "",
        index,
        image=_picture(row["image"], images, table, place),
        options=tuple(options),
        answer=answer,
        group=str(int(number) % PASS),
    )
    parts = {key: row[key].strip() for key in ("split", "category") if row.get(key, "").strip()}
    return Entry(question, parts)


def _picture(value: str, images: dict[str, str], table: Path, place: str) -> bytes:
    """The picture's bytes; a value that is the index of another row stands for that row's."""
    encoded = images.get(value.strip(), value)
    try:
        content = base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError):
        content = b""
    if not content:
        raise malformed(table, f"{place} without a picture in base64", "a picture in every row")
    return content


MMBENCH = Benchmark(
    name="MMBench",
    home="https://github.com/open-compass/MMBench",
    layout="a TSV such as MMBench_DEV_EN.tsv, or a folder with one",
    read=_read,
)
