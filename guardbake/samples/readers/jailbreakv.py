"""JailBreakV-28K: jailbreaks of text models carried over to pictures (arXiv 2404.03027).

Layout: huggingface.co/datasets/JailbreakV-28K/JailBreakV-28k, folder JailBreakV_28K, with the
tables JailBreakV_28K.csv and mini_JailBreakV_28K.csv and the pictures in figstep/,
llm_transfer_attack/ and query_related/. Columns used: jailbreak_query (asked), redteam_query (the
plain request), image_path (below the folder), format, policy, selected_mini, transfer_from_llm.
The hub holds the pictures of the mini set; the whole archive is linked from the project's page.

Formats: Template, Persuade and Logic are text jailbreaks beside a picture that does not matter;
figstep, typo, SD and SD_typo put the request into the picture. Family: jailbreakv/<format>.
Parts: format, policy, origin (llm-transfer or picture), set (mini or rest).
"""

from __future__ import annotations

from pathlib import Path

from guardbake.samples import Prompt
from guardbake.samples.readers.benchmark import Benchmark, Entry, missing
from guardbake.samples.readers.files import Row, first_of, inside, malformed, table_of, words_of

TABLES = ("JailBreakV_28K.csv", "mini_JailBreakV_28K.csv")
COLUMNS = (
    "jailbreak_query",
    "redteam_query",
    "image_path",
    "format",
    "policy",
    "selected_mini",
    "transfer_from_llm",
)
TRUTH = {"true": True, "1": True, "false": False, "0": False}


def _read(path: Path) -> list[Entry]:
    nested = (f"JailBreakV_28K/{name}" for name in TABLES)
    table = path if path.is_file() else first_of(path, (*TABLES, *nested))
    if table is None:
        raise missing(path, f"{TABLES[0]} and no {TABLES[1]}")
    return [_entry(row, index, table) for index, row in enumerate(table_of(table, COLUMNS))]


def _entry(row: Row, index: int, table: Path) -> Entry:
    place = f"row {index}"
    kind = words_of(row, "format", table, place)
    image = words_of(row, "image_path", table, place)
    prompt = Prompt(
        words_of(row, "jailbreak_query", table, place),
        "harmful",
        "",
        index,
        image=inside(table.parent, image, f"{table.name} {place}"),
        family=f"jailbreakv/{kind}",
        goal=words_of(row, "redteam_query", table, place),
    )
    parts = {
        "format": kind,
        "policy": words_of(row, "policy", table, place),
        "origin": "llm-transfer" if _flag(row, "transfer_from_llm", table, place) else "picture",
        "set": "mini" if _flag(row, "selected_mini", table, place) else "rest",
    }
    return Entry(prompt, parts)


def _flag(row: Row, column: str, table: Path, place: str) -> bool:
    value = row[column].strip().lower()
    if value not in TRUTH:
        raise malformed(table, f"{place} with {column} {value!r}", "True or False")
    return TRUTH[value]


JAILBREAKV = Benchmark(
    name="JailBreakV-28K",
    home="https://huggingface.co/datasets/JailbreakV-28K/JailBreakV-28k",
    layout=f"a folder with {TABLES[0]} or {TABLES[1]}, and figstep/, llm_transfer_attack/ and "
    "query_related/ beside the table",
    read=_read,
)
