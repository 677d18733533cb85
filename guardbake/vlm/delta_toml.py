"""`delta.toml`: which base, which files, which geometry. A missing or unknown key is an error."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from guardbake.errors import MalformedError

_TABLES: dict[str, dict[str, type]] = {
    "base": {"package": str, "module": str, "version": str, "file": str, "sha256": str},
    "language": {"rank": int, "scale": float},
    "image": {
        "token": str, "columns": int, "rows": int, "cell": int, "mean": float, "std": float,
    },
    "vision": {
        "hidden_size": int, "intermediate_size": int, "num_hidden_layers": int,
        "num_attention_heads": int, "projection_dim": int,
    },
    "about": {"licence": str, "font": str, "trained_on": list},
}  # fmt: skip


@dataclass(frozen=True)
class Delta:
    """What delta.toml says.

    package, module, version, file, sha256: a file in the folder of an installed module.
    files: the delta's own files and their SHA-256.
    rank, scale: weight += scale * up @ down, up [out, rank], down [rank, in].
    image_token: the tokenizer's token that an image takes the places of.
    columns, rows, cell: the picture is columns * cell by rows * cell px, one image token per cell.
    mean, std: pixel values are (value / 255 - mean) / std.
    vision: arguments of CLIPVisionConfig, without the picture's geometry.
    """

    package: str
    module: str
    version: str
    file: str
    sha256: str
    files: dict[str, str]
    rank: int
    scale: float
    image_token: str
    columns: int
    rows: int
    cell: int
    mean: float
    std: float
    vision: dict[str, int]


def read_delta(path: Path) -> Delta:
    """Read delta.toml. Raises MalformedError when it is missing, not TOML, or not as described."""
    try:
        tables = tomllib.loads(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise _malformed(path, str(error)) from error
    files = tables.pop("files", None)
    if not isinstance(files, dict) or not files:
        raise _malformed(path, "no table [files]")
    for name, digest in files.items():
        if not isinstance(digest, str) or len(digest) != 64 or Path(name).name != name:
            raise _malformed(path, f"[files] {name!r} that is not a plain name with a SHA-256")
    if set(tables) != set(_TABLES):
        raise _malformed(path, f"the tables {sorted(tables)}")
    for table, keys in _TABLES.items():
        _check_table(path, table, tables[table], keys)
    base, language, image = tables["base"], tables["language"], tables["image"]
    return Delta(
        **base,
        files=files,
        **language,
        image_token=image.pop("token"),
        **image,
        vision=tables["vision"],
    )


def _check_table(path: Path, table: str, found: Any, keys: dict[str, type]) -> None:
    if not isinstance(found, dict) or set(found) != set(keys):
        raise _malformed(path, f"[{table}] with the keys {sorted(found)}")
    for key, kind in keys.items():
        if not isinstance(found[key], kind) or isinstance(found[key], bool):
            raise _malformed(path, f"[{table}] {key} = {found[key]!r}")


def _malformed(path: Path, found: str) -> MalformedError:
    tables = "; ".join(f"[{name}] {', '.join(keys)}" for name, keys in _TABLES.items())
    return MalformedError(
        found=found,
        expected=f"exactly these tables and keys: [files] name = SHA-256; {tables}",
        where=str(path),
        remedy="check out the delta again, or build it with tools/make_demo",
    )
