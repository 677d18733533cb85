"""AdvBench as its authors publish it, a table of goals and targets (arXiv 2307.15043).

Layout: github.com/llm-attacks/llm-attacks, data/advbench/harmful_behaviors.csv, 520 rows with the
columns goal and target. The target, an affirmative opening, is not read.
"""

from __future__ import annotations

from pathlib import Path

from guardbake.samples import Prompt
from guardbake.samples.readers.benchmark import Benchmark, Entry, missing
from guardbake.samples.readers.files import first_of, table_of, words_of

FILE = "harmful_behaviors.csv"


def _read(path: Path) -> list[Entry]:
    table = path if path.is_file() else first_of(path, (FILE, f"data/advbench/{FILE}"))
    if table is None:
        raise missing(path, FILE)
    return [
        Entry(Prompt(words_of(row, "goal", table, f"row {index}"), "harmful", "", index), {})
        for index, row in enumerate(table_of(table, ("goal",)))
    ]


ADVBENCH_CSV = Benchmark(
    name="AdvBench",
    home="https://github.com/llm-attacks/llm-attacks",
    layout=f"{FILE}, or a folder with it",
    read=_read,
)
