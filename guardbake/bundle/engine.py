"""What an engine's record states, held against what it was compiled from. No engine is run.

The record is written beside the engine by whoever compiled it (`plugins.EngineBuilder`). A record
of an earlier graph, of other weights or under other settings is what a stale engine looks like.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from guardbake.bundle.canonical import parse
from guardbake.bundle.files import FileEntry
from guardbake.bundle.manifest import DECODER, EngineBuilt, Manifest
from guardbake.errors import IntegrityError

# The certificate is about float32 products and about a gate that a NaN opens: an engine that rounds
# products to ten bits of mantissa, or that may drop NaNs, is not what was certified.
SETTINGS = {"TF32": "False", "STRICT_NANS": "True"}
_REMEDY = "do not ship this engine: build it again from the bundle's own graph"


@dataclass(frozen=True)
class Compiled:
    """What the record of one engine has to state.

    engine: its own file. graph: the file it was compiled from, and data: those with the graph's
    weights. guard: digest of the guard in that graph, None if it carries none, and nodes: the
    guard's nodes by name.
    """

    engine: FileEntry
    graph: FileEntry
    data: tuple[FileEntry, ...]
    guard: str | None
    nodes: tuple[str, ...]


def check_engines(folder: Path, manifest: Manifest, nodes: Sequence[str]) -> None:
    """Every engine the manifest names was compiled from this decoder, its weights and its guard.

    nodes: the guard's nodes by name, each of which must have become layers. Raises IntegrityError
    at the first record that says otherwise, MalformedError if one is no JSON.
    """
    engine = manifest.origins.engine
    entries = {entry.name: entry for entry in manifest.files}
    for name in engine.records if isinstance(engine, EngineBuilt) else ():
        own = name.removesuffix(".json")
        if own not in entries:
            _refuse(f"no file {own}", "the engine that the record is of", str(folder / name))
        data = tuple(entry for entry in manifest.files if entry.name.startswith(f"{DECODER}."))
        guard = manifest.origins.guard
        compiled = Compiled(entries[own], entries[DECODER], data, guard, tuple(nodes))
        check_record(folder / name, compiled)


def check_record(path: Path, compiled: Compiled) -> None:
    """The record at `path` states what `compiled` says; raises as `check_engines` does."""
    where = str(path)
    record = parse(path.read_bytes(), where, _REMEDY)
    if not isinstance(record, dict):
        _refuse(f"a JSON {type(record).__name__}", "an engine's record", where)
    _check_files(record, compiled, where)
    _check_settings(record, where)
    _check_guard(record, compiled, where)


def _check_files(record: dict[str, Any], compiled: Compiled, where: str) -> None:
    """The engine's own file, the graph, and the files of weights that the graph reads."""
    built = compiled.engine.sha256, compiled.engine.size
    stated = record.get("engine_sha256"), record.get("engine_bytes")
    if stated != built:
        _refuse(f"a record of engine {stated[0]!s:.16}", f"engine {built[0]:.16}", where)
    graph, source = record.get("onnx_sha256"), compiled.graph
    if graph != source.sha256:
        _refuse(f"an engine of {source.name} {graph!s:.16}", f"{source.sha256:.16}", where)
    wanted = [[Path(each.name).name, each.sha256] for each in compiled.data]
    if record.get("data_sha256") != wanted:
        _refuse("an engine of other weights", f"one of {len(wanted)} data files as listed", where)


def _check_settings(record: dict[str, Any], where: str) -> None:
    if record.get("status") != "compiled":
        _refuse(f"status {record.get('status')!r:.40}", "an engine that was compiled", where)
    stated = record.get("settings")
    for name, wanted in SETTINGS.items():
        if not isinstance(stated, list) or [name, wanted] not in stated:
            _refuse(f"settings {stated!s:.80}", f"{name} {wanted}, as certified", where)


def _check_guard(record: dict[str, Any], compiled: Compiled, where: str) -> None:
    if record.get("guard_digest") != compiled.guard:
        found = f"an engine with guard {record.get('guard_digest')!s:.12}"
        _refuse(found, f"guard {compiled.guard!s:.12}", where)
    entries = record.get("guard")
    layers = {
        str(entry.get("node")): entry.get("layers")
        for entry in (entries if isinstance(entries, list) else [])
        if isinstance(entry, dict)
    }
    for node in compiled.nodes:
        if not layers.get(node):
            _refuse(f"no layer of {node}", "each guard node compiled into layers", where)


def _refuse(found: str, expected: str, where: str) -> NoReturn:
    raise IntegrityError(found=found, expected=expected, where=where, remedy=_REMEDY)
