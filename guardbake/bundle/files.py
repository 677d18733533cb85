"""The files of a folder: listed, described by size and sha256, compared with such a description."""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from guardbake.bundle.canonical import JSON
from guardbake.errors import IntegrityError, MalformedError

MAX_NAME = 1024  # characters; file systems end at 4096 bytes for the whole path
_HEX = re.compile(r"[0-9a-f]{64}")
_REMEDY = "write it again with guardbake; nothing here is mended by hand"


def require_digest(text: object, where: str) -> str:
    """`text` if it is a sha256 in lower-case hexadecimal; MalformedError otherwise."""
    if not isinstance(text, str) or _HEX.fullmatch(text) is None:
        raise MalformedError(
            found=f"{text!r:.80}", expected="64 hexadecimal digits", where=where, remedy=_REMEDY
        )
    return text


def require_name(name: object, where: str) -> str:
    """`name` if it is a plain relative POSIX path that stays inside its folder."""
    reason = "not text" if not isinstance(name, str) else unsafe(name)
    if reason:
        raise MalformedError(
            found=f"the name {name!r:.120} ({reason})",
            expected="a relative name inside the folder, parts joined by /",
            where=where,
            remedy=_REMEDY,
        )
    assert isinstance(name, str)
    return name


def unsafe(name: str) -> str:
    """Why `name` is no plain relative POSIX path inside its folder; empty if it is one."""
    if len(name) > MAX_NAME:
        return "too long"
    if not name.isprintable() or "\\" in name or ":" in name:
        return "a character that some file system reads otherwise"
    if name.startswith("/"):
        return "absolute"
    parts = name.split("/")
    if any(part in ("", ".", "..") for part in parts):
        return "empty or dotted parts"
    return "too long" if any(len(part.encode()) > 255 for part in parts) else ""


@dataclass(frozen=True)
class FileEntry:
    """One file: name relative to its folder, size in bytes, sha256 in hexadecimal.

    Raises MalformedError on a name that leaves the folder, a negative size, a digest not in hex.
    """

    name: str
    size: int
    sha256: str

    def __post_init__(self) -> None:
        require_name(self.name, "a file entry")
        require_digest(self.sha256, f"the entry of {self.name}")
        if isinstance(self.size, bool) or not isinstance(self.size, int) or self.size < 0:
            raise MalformedError(
                found=f"size {self.size!r:.40}",
                expected="a number of bytes",
                where=f"the entry of {self.name}",
                remedy=_REMEDY,
            )


def entries_to_json(entries: Iterable[FileEntry]) -> JSON:
    return [{"name": e.name, "sha256": e.sha256, "size": e.size} for e in entries]


def entries_from_json(value: Any, where: str) -> tuple[FileEntry, ...]:
    """The entries in their order; raises MalformedError unless they are distinct and sorted."""
    if not isinstance(value, list) or any(
        not isinstance(item, dict) or set(item) != {"name", "sha256", "size"} for item in value
    ):
        raise MalformedError(
            found="something else",
            expected="a list of files, each with name, sha256 and size",
            where=where,
            remedy=_REMEDY,
        )
    entries = tuple(FileEntry(item["name"], item["size"], item["sha256"]) for item in value)
    require_distinct([entry.name for entry in entries], where)
    return entries


def require_distinct(names: list[str], where: str) -> None:
    """Names sorted, each once, also where the file system does not tell upper from lower case."""
    counts = Counter(name.casefold() for name in names)
    twice = [name for name in names if counts[name.casefold()] > 1]
    if twice or names != sorted(names):
        raise MalformedError(
            found=f"{twice[0]!r} more than once" if twice else "names out of order",
            expected="every name once, sorted",
            where=where,
            remedy=_REMEDY,
        )


def list_files(folder: Path) -> dict[str, int]:
    """Size in bytes of every file below `folder`, by sorted relative name.

    Raises IntegrityError on a symbolic link or anything else that is neither file nor folder.
    """
    return dict(sorted(_walk(folder, "")))


def _walk(folder: Path, prefix: str) -> Iterator[tuple[str, int]]:
    with os.scandir(folder) as items:
        for item in items:
            name = f"{prefix}{item.name}"
            state = item.stat(follow_symlinks=False)
            if stat.S_ISDIR(state.st_mode):
                yield from _walk(Path(item.path), f"{name}/")
            elif stat.S_ISREG(state.st_mode):
                yield name, state.st_size
            else:
                kind = "a symbolic link" if item.is_symlink() else "a special file"
                _amiss(f"{name}, {kind}", "plain files and folders only", folder)


def describe(folder: Path, name: str) -> FileEntry:
    """Read the file and say what it is."""
    with (folder / name).open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return FileEntry(name, os.fstat(file.fileno()).st_size, digest)


def compare(
    folder: Path,
    entries: Iterable[FileEntry],
    besides: str,
    rehash: Callable[[FileEntry], bool],
) -> int:
    """Compare a folder with the description of its files; returns how many were read again.

    besides: the one file that holds the description and is not described itself. rehash: whether to
    read a file and compare digests, not only sizes. Raises IntegrityError naming the first file
    that is missing, extra, of another size or of another digest.
    """
    found = list_files(folder)
    found.pop(besides, None)
    wanted = {entry.name: entry for entry in entries}
    for name in sorted(set(wanted) - set(found)):
        _amiss(f"no file {name}", f"{name} of {wanted[name].size} bytes", folder)
    for name in sorted(set(found) - set(wanted)):
        _amiss(f"the extra file {name!r:.120}", f"only the files that {besides} lists", folder)
    for name, size in found.items():
        if size != wanted[name].size:
            _amiss(f"{name} of {size} bytes", f"{wanted[name].size} bytes", folder)
    again = [entry for entry in wanted.values() if rehash(entry)]
    for entry in again:
        digest = describe(folder, entry.name).sha256
        if digest != entry.sha256:
            _amiss(f"{entry.name} with sha256 {digest[:16]}", f"sha256 {entry.sha256[:16]}", folder)
    return len(again)


def _amiss(found: str, expected: str, folder: Path) -> NoReturn:
    raise IntegrityError(
        found=found,
        expected=expected,
        where=str(folder),
        remedy="do not use this folder: remove it and write it again, or take it from its source",
    )
