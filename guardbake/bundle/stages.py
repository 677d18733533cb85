"""Stages of a bake: each writes one folder, named after everything its content depends on.

A stage that is done is never done again; one that was cut short, at whatever instruction, is as if
it had not begun. Two bakes may build the same stage at once: the first to finish puts its folder in
place, the other finds it there and drops its own, which holds the same content by construction.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from guardbake.bundle.canonical import JSON, canonical, canonical_lines, digest_of, parse
from guardbake.bundle.files import (
    FileEntry,
    compare,
    describe,
    entries_from_json,
    entries_to_json,
    list_files,
)
from guardbake.bundle.folders import (
    PARTIAL,
    beside,
    flush,
    flush_folder,
    locked,
    partial_folder,
    remove,
)
from guardbake.errors import IntegrityError, MalformedError, UsageError

RECORD = "stage.json"
SCHEMA = 1
_NAME = re.compile(r"[a-z][a-z0-9_-]*")


@dataclass(frozen=True)
class Stage:
    """One stage: `folder` is where its files stand once it is done, `key` what they depend on."""

    folder: Path
    key: Mapping[str, JSON]

    @property
    def done(self) -> bool:
        """Whether the folder is complete, told by its record and the sizes of its files."""
        try:
            self._compare(full=False)
        except (IntegrityError, MalformedError):
            return False
        return True

    def check(self) -> None:
        """Read every file again; raises IntegrityError or MalformedError if one has changed."""
        self._compare(full=True)

    def _compare(self, full: bool) -> None:
        compare(self.folder, self._recorded(), RECORD, lambda _: full)

    def _recorded(self) -> tuple[FileEntry, ...]:
        where, remedy = str(self.folder / RECORD), "remove the stage's folder and bake again"
        try:
            data = (self.folder / RECORD).read_bytes()
        except OSError as error:
            raise IntegrityError(
                found=f"no record ({error.strerror})",
                expected="a complete stage",
                where=where,
                remedy=remedy,
            ) from error
        value = parse(data, where, remedy)
        if not isinstance(value, dict) or set(value) != {"schema", "key", "files"}:
            raise MalformedError(
                found="other contents", expected="a stage record", where=where, remedy=remedy
            )
        if value["schema"] != SCHEMA or canonical(value["key"]) != canonical(self.key):
            raise IntegrityError(
                found="the record of another stage",
                expected=f"schema {SCHEMA} and this stage's key",
                where=where,
                remedy=remedy,
            )
        return entries_from_json(value["files"], where)

    @contextmanager
    def writing(self) -> Iterator[Path]:
        """A temporary folder that becomes the stage's folder when the body ends well.

        On any exception, KeyboardInterrupt included, it is removed. Raises ResourceFault if the
        disk is full (also within the body), IntegrityError if the body leaves symbolic links,
        UsageError if it writes the record's name itself.
        """
        with partial_folder(self.folder) as path:
            yield path
            names = list(list_files(path))
            if RECORD in names:
                raise UsageError(
                    found=f"a file {RECORD}",
                    expected="any other name: the stage's record has this one",
                    where=str(self.folder),
                    remedy="rename the file that the stage writes",
                )
            record: JSON = {
                "schema": SCHEMA,
                "key": self.key,
                "files": entries_to_json(describe(path, name) for name in names),
            }
            (path / RECORD).write_text(canonical_lines(record), encoding="utf-8")
            flush(path)
            self._put(path)

    def _put(self, path: Path) -> None:
        """Move the complete folder into place, unless another bake was first."""
        with locked(self.folder.parent):
            if self.done:
                return
            if os.path.lexists(self.folder):
                broken = beside(self.folder, PARTIAL)
                os.rename(self.folder, broken)
                remove(broken)
            os.rename(path, self.folder)
            flush_folder(self.folder.parent)


class Workspace:
    """The folder that holds the stages. root: made when the first stage is written."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def stage(self, name: str, key: Mapping[str, JSON]) -> Stage:
        """The stage `name` for `key`: digests, texts and numbers, of everything it depends on.

        The folder is root/<name>-<first 16 digits of sha256 of the key's canonical JSON>. Raises
        UsageError if the name is not lower-case letters, digits, - and _.
        """
        if _NAME.fullmatch(name) is None:
            raise UsageError(
                found=f"the stage name {name!r}",
                expected="lower-case letters, digits, - and _, a letter first",
                where="Workspace.stage",
                remedy="rename the stage",
            )
        return Stage(self.root / f"{name}-{digest_of(key)[:16]}", key)


def run_stage(stage: Stage, build: Callable[[Path], None]) -> tuple[Path, bool]:
    """The stage's folder, built by `build(folder)` unless it was done; and whether it was."""
    if stage.done:
        return stage.folder, True
    with stage.writing() as folder:
        build(folder)
    return stage.folder, False
