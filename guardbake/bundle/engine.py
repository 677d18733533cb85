"""What an engine's record states, held against the bundle it lies in. No engine is read or run.

The record is written beside the engine by whoever compiled it (`plugins.EngineBuilder`). A record
of an earlier graph, of other weights or under other settings is what a stale engine looks like.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from guardbake.bundle.canonical import parse
from guardbake.bundle.manifest import DECODER, EngineBuilt, Manifest
from guardbake.errors import IntegrityError

# The certificate is about float32 products and about a gate that a NaN opens: an engine that rounds
# products to ten bits of mantissa, or that may drop NaNs, is not what was certified.
SETTINGS = {"TF32": "False", "STRICT_NANS": "True"}
_REMEDY = "do not ship this engine: build it again from the bundle's own graph"


def check_engines(folder: Path, manifest: Manifest, nodes: Sequence[str]) -> None:
    """Every engine the manifest names was compiled from this decoder, its weights and its guard.

    nodes: the guard's nodes by name, each of which must have become layers. Raises IntegrityError
    at the first record that says otherwise, MalformedError if one is no JSON.
    """
    engine = manifest.origins.engine
    for name in engine.records if isinstance(engine, EngineBuilt) else ():
        where = str(folder / name)
        record = parse((folder / name).read_bytes(), where, _REMEDY)
        if not isinstance(record, dict):
            _refuse(f"a JSON {type(record).__name__}", "an engine's record", where)
        _check_files(record, name.removesuffix(".json"), manifest, where)
        _check_settings(record, where)
        _check_guard(record, nodes, where)


def _check_files(record: dict[str, Any], engine: str, manifest: Manifest, where: str) -> None:
    """The engine's own file, the graph, and the files of weights that the graph reads."""
    entries = {entry.name: entry for entry in manifest.files}
    if engine not in entries:
        _refuse(f"no file {engine}", "the engine that the record is of", where)
    built = entries[engine].sha256, entries[engine].size
    stated = record.get("engine_sha256"), record.get("engine_bytes")
    if stated != built:
        _refuse(f"a record of engine {stated[0]!s:.16}", f"engine {built[0]:.16}", where)
    graph = record.get("onnx_sha256")
    if graph != manifest.onnx[DECODER]:
        _refuse(f"an engine of {DECODER} {graph!s:.16}", f"{manifest.onnx[DECODER]:.16}", where)
    wanted = [[e.name, e.sha256] for e in manifest.files if e.name.startswith(f"{DECODER}.")]
    if record.get("data_sha256") != wanted:
        _refuse("an engine of other weights", f"one of {len(wanted)} data files as listed", where)


def _check_settings(record: dict[str, Any], where: str) -> None:
    if record.get("status") != "compiled":
        _refuse(f"status {record.get('status')!r:.40}", "an engine that was compiled", where)
    stated = record.get("settings")
    for name, wanted in SETTINGS.items():
        if not isinstance(stated, list) or [name, wanted] not in stated:
            _refuse(f"settings {stated!s:.80}", f"{name} {wanted}, as certified", where)


def _check_guard(record: dict[str, Any], nodes: Sequence[str], where: str) -> None:
    entries = record.get("guard")
    layers = {
        str(entry.get("node")): entry.get("layers")
        for entry in (entries if isinstance(entries, list) else [])
        if isinstance(entry, dict)
    }
    for node in nodes:
        if not layers.get(node):
            _refuse(f"no layer of {node}", "each guard node compiled into layers", where)


def _refuse(found: str, expected: str, where: str) -> NoReturn:
    raise IntegrityError(found=found, expected=expected, where=where, remedy=_REMEDY)
