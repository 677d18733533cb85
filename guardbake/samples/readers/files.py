"""What every reader needs of a file or a folder: text, tables, JSON, and paths that stay inside.

Every error is a MalformedError that names the file and the row, never what stands there.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable, Sequence
from io import StringIO
from pathlib import Path
from typing import Any

from guardbake.errors import MalformedError

Row = dict[str, str]


def text_of(path: Path) -> str:
    """The whole file as UTF-8, with or without a byte order mark."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise malformed(path, f"byte {error.start} that is not UTF-8", "UTF-8 text") from None


def table_of(path: Path, columns: Sequence[str], delimiter: str = ",") -> list[Row]:
    """The rows of a table with a header, quoted as RFC 4180 has it; further columns are kept.

    A picture in base64 is longer than the csv module's default bound on a field, so the bound is
    lifted while this file is read.
    """
    bound = csv.field_size_limit(2**31 - 1)
    try:
        reader = csv.DictReader(
            StringIO(text_of(path), newline=""), delimiter=delimiter, strict=True
        )
        header = reader.fieldnames or []
        absent = [name for name in columns if name not in header]
        if absent:
            raise malformed(path, f"no column {', '.join(absent)}", f"columns {', '.join(columns)}")
        rows = list(reader)
    except csv.Error as error:
        raise malformed(path, f"no table: {error}", "a table with a header") from None
    finally:
        csv.field_size_limit(bound)
    for number, row in enumerate(rows):
        if None in row or None in row.values():
            raise malformed(path, f"row {number} of another length than the header", "whole rows")
    return rows


def json_of(path: Path) -> Any:
    """The value of a JSON file."""
    try:
        return json.loads(text_of(path))
    except (json.JSONDecodeError, RecursionError):
        raise malformed(path, "no JSON", "a JSON file") from None


def objects_of(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """(key, object) pairs of a JSON file that is an object of objects, in the file's order."""
    value = json_of(path)
    if not isinstance(value, dict):
        raise malformed(path, f"a JSON {type(value).__name__}", "a JSON object of objects")
    for key, entry in value.items():
        if not isinstance(entry, dict):
            raise malformed(path, f"entry {key!r} that is no object", "a JSON object of objects")
    return list(value.items())


def words_of(entry: dict[str, Any], key: str, path: Path, place: str) -> str:
    """entry[key], which must be a string with something in it; stripped.

    JSON can spell half of a surrogate pair, which is no text and which no tokenizer takes.
    """
    value = entry.get(key)
    if not isinstance(value, str) or not value.strip() or re.search("[\ud800-\udfff]", value):
        raise malformed(path, f"{place} without {key!r}", f"text under {key!r} everywhere")
    return value.strip()


def inside(folder: Path, relative: str, place: str) -> Path:
    """The path of a file that a benchmark's own file names, which must stay inside the folder.

    place: source and index, for the error. An absolute path, one that climbs out and one that a
    symbolic link leads out are refused: what names it is data of somebody else.
    """
    path = folder / relative
    if not relative or "\0" in relative or not path.resolve().is_relative_to(folder.resolve()):
        raise MalformedError(
            found="a file name that leads out of the benchmark's folder",
            expected=f"a path inside {folder}",
            where=place,
            remedy="mend the benchmark's file; a download whose files are links must be copied",
        )
    return path


def first_of(folder: Path, names: Iterable[str]) -> Path | None:
    """The first of these paths below the folder that exists."""
    return next((folder / name for name in names if (folder / name).exists()), None)


def malformed(path: Path, found: str, expected: str) -> MalformedError:
    return MalformedError(
        found=found, expected=expected, where=str(path), remedy="mend or reinstall the file"
    )
