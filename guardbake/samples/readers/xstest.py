"""XSTest: safe prompts that look unsafe, and unsafe contrasts to them (arXiv 2308.01263).

Layout: github.com/paul-rottger/xstest, xstest_prompts.csv (xstest_v2_prompts.csv before it was
renamed), 450 rows with the columns id, prompt, type, label, focus, note; 250 safe in ten types and
200 unsafe in eight, whose types begin with "contrast_". Copies without the column label are read by
that. Safe prompts are harmless, unsafe ones harmful: the label a recipe asks for picks the side.
Part: the type.
"""

from __future__ import annotations

from pathlib import Path

from guardbake.samples import Label, Prompt
from guardbake.samples.readers.benchmark import Benchmark, Entry, missing
from guardbake.samples.readers.files import Row, first_of, malformed, table_of, words_of

FILES = ("xstest_prompts.csv", "xstest_v2_prompts.csv")
CONTRAST = "contrast_"
LABELS: dict[str, Label] = {"safe": "harmless", "unsafe": "harmful"}


def _read(path: Path) -> list[Entry]:
    places = (*FILES, *(f"data/{name}" for name in FILES))
    table = path if path.is_file() else first_of(path, places)
    if table is None:
        raise missing(path, FILES[0])
    return [_entry(row, index, table) for index, row in enumerate(table_of(table, _COLUMNS))]


def _entry(row: Row, index: int, table: Path) -> Entry:
    place = f"row {index}"
    kind = words_of(row, "type", table, place)
    said = row.get("label", "unsafe" if kind.startswith(CONTRAST) else "safe").strip()
    if said not in LABELS:
        raise malformed(table, f"{place} with label {said!r}", " or ".join(LABELS))
    prompt = Prompt(words_of(row, "prompt", table, place), LABELS[said], "", index)
    return Entry(prompt, {"type": kind})


_COLUMNS = ("prompt", "type")

XSTEST = Benchmark(
    name="XSTest",
    home="https://github.com/paul-rottger/xstest",
    layout=f"{FILES[0]}, or a folder with it",
    read=_read,
)
