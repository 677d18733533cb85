"""The manifest of a bundle: every file, and the chain of digests from source model to certificate.

`manifest.json` is written in one spelling and refused in any other, so equal bundles have equal
manifests and nothing in one goes unread. It is not signed: it tells damage and mix-ups, and whoever
can rewrite it can rewrite the bundle; `verify` therefore also reads the graph against the guard.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, TypeAlias

from guardbake.bundle.canonical import JSON, canonical_lines, parse
from guardbake.bundle.files import (
    FileEntry,
    compare,
    describe,
    entries_from_json,
    entries_to_json,
    list_files,
    require_digest,
    require_distinct,
    require_name,
)
from guardbake.errors import MalformedError

MANIFEST = "manifest.json"
CERTIFICATE = "certificate.json"
RECIPE = "recipe.json"
GUARD = "guard.safetensors"
DECODER = "decoder.onnx"
SCHEMA = 1
SMALL = 64_000_000  # bytes; files below it are read again at every check
_REMEDY = "write the bundle again with guardbake bake"
_CHAIN = {"model", "samples", "guard", "onnx", "engine", "certificate"}


@dataclass(frozen=True)
class EngineBuilt:
    """records: names of the bundle's files that say how each engine was built, at least one."""

    records: tuple[str, ...]


@dataclass(frozen=True)
class EngineNotBuilt:
    """reason: why there is no engine, in words."""

    reason: str


Engine: TypeAlias = EngineBuilt | EngineNotBuilt


@dataclass(frozen=True)
class Origins:
    """What the bundle was made from.

    model: digest of the source checkpoint. samples: digest by split. guard: GuardSpec.digest, which
    is of the guard's meaning, not of its file. tools: version by package name.
    """

    model: str
    samples: Mapping[str, str]
    guard: str
    engine: Engine
    tools: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Manifest:
    """files: all but the manifest itself, by sorted name. Checked when made: MalformedError."""

    files: tuple[FileEntry, ...]
    origins: Origins

    def __post_init__(self) -> None:
        require_distinct([entry.name for entry in self.files], MANIFEST)
        origins = self.origins
        for digest in (origins.model, origins.guard, *origins.samples.values()):
            require_digest(digest, f"{MANIFEST}: chain")
        for text in (*origins.samples, *origins.tools, *origins.tools.values()):
            _require_text(text)
        names = {entry.name for entry in self.files}
        if MANIFEST in {name.casefold() for name in names}:
            _refuse(f"an entry for {MANIFEST} itself", "entries for the other files")
        if isinstance(origins.engine, EngineNotBuilt):
            _require_text(origins.engine.reason)
        elif not origins.engine.records:
            _refuse("an engine without a record", "the names of its record files")
        for name in (CERTIFICATE, *self._records):
            if name not in names:
                _refuse(f"no entry for {name}", "an entry for every file that the chain names")

    @property
    def _records(self) -> tuple[str, ...]:
        engine = self.origins.engine
        return engine.records if isinstance(engine, EngineBuilt) else ()

    def sha256(self, name: str) -> str:
        """Digest of the file `name`; raises KeyError if the bundle has none."""
        return {entry.name: entry.sha256 for entry in self.files}[name]

    @property
    def onnx(self) -> dict[str, str]:
        """sha256 of each ONNX graph by file name; external data files are among `files`."""
        return {e.name: e.sha256 for e in self.files if e.name.endswith(".onnx")}

    def to_json(self) -> str:
        """The one spelling: sorted keys, two spaces, a newline at the end."""
        origins = self.origins
        engine: JSON
        if isinstance(origins.engine, EngineBuilt):
            engine = {"records": {name: self.sha256(name) for name in origins.engine.records}}
        else:
            engine = {"not_built": origins.engine.reason}
        return canonical_lines(
            {
                "schema": SCHEMA,
                "files": entries_to_json(self.files),
                "chain": {
                    "model": origins.model,
                    "samples": origins.samples,
                    "guard": origins.guard,
                    "onnx": self.onnx,
                    "engine": engine,
                    "certificate": self.sha256(CERTIFICATE),
                },
                "tools": origins.tools,
            }
        )


def manifest_from_json(data: bytes, where: str) -> Manifest:
    """The manifest that `data` spells; raises MalformedError on anything off."""
    value = _keys(parse(data, where, _REMEDY), {"schema", "files", "chain", "tools"}, where)
    if value["schema"] != SCHEMA:
        _refuse(f"schema {value['schema']!r:.40}", f"schema {SCHEMA}", where)
    chain = _keys(value["chain"], _CHAIN, f"{where}: chain")
    origins = Origins(
        model=chain["model"],
        samples=_texts(chain["samples"], f"{where}: samples"),
        guard=chain["guard"],
        engine=_engine(chain["engine"], f"{where}: engine"),
        tools=_texts(value["tools"], f"{where}: tools"),
    )
    manifest = Manifest(entries_from_json(value["files"], where), origins)
    if manifest.to_json().encode() != data:
        _refuse(
            "a chain that contradicts the files, or another spelling",
            "the bytes that guardbake writes for this bundle",
            where,
        )
    return manifest


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `manifest.json`; same manifest, same bytes."""
    (folder / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")


def read_manifest(folder: Path) -> Manifest:
    """Read `folder`/manifest.json; raises MalformedError if it is absent or off."""
    path = folder / MANIFEST
    if path.is_symlink():
        _refuse("a symbolic link", "a plain file", str(path))
    try:
        data = path.read_bytes()
    except OSError as error:
        _refuse(f"no readable manifest ({error.strerror})", "a bundle's manifest", str(path))
    return manifest_from_json(data, str(path))


def manifest_of(folder: Path, origins: Origins) -> Manifest:
    """The manifest of the files that stand in `folder`; reads them all."""
    names = [name for name in list_files(folder) if name != MANIFEST]
    return Manifest(tuple(describe(folder, name) for name in names), origins)


def check_files(folder: Path, manifest: Manifest, full: bool) -> int:
    """Compare the folder with its manifest; returns how many files were read again.

    full: read all files; otherwise only those below 64 MB, and of the rest the size. Raises
    IntegrityError naming the first file that is missing, extra, a link, of other size or digest.
    """
    return compare(folder, manifest.files, MANIFEST, lambda e: full or e.size < SMALL)


def _refuse(found: str, expected: str, where: str = MANIFEST) -> NoReturn:
    raise MalformedError(found=found, expected=expected, where=where, remedy=_REMEDY)


def _require_text(text: object) -> None:
    if not isinstance(text, str) or not text.strip():
        _refuse(f"{text!r:.40}", "a text that says something")


def _keys(value: Any, wanted: set[str], where: str) -> dict[str, Any]:
    """`value`, if it is an object with exactly these keys."""
    if not isinstance(value, dict):
        _refuse(f"{type(value).__name__}", "an object", where)
    off = sorted(wanted ^ set(value))
    if off:
        what = "an unknown" if off[0] in value else "no"
        _refuse(f"{what} key {off[0]!r:.80}", f"the keys {', '.join(sorted(wanted))}", where)
    return value


def _texts(value: Any, where: str) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()):
        _refuse("something else", "an object of texts", where)
    return value


def _engine(value: Any, where: str) -> Engine:
    if isinstance(value, dict) and "not_built" in value:
        return EngineNotBuilt(_texts(_keys(value, {"not_built"}, where), where)["not_built"])
    records = _texts(_keys(value, {"records"}, where)["records"], where)
    return EngineBuilt(tuple(require_name(name, where) for name in records))
