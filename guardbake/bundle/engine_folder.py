"""A folder of engines that were built from a model after it was baked, and what they were built of.

`engines.json` is to such a folder what `manifest.json` is to a bundle: it lists every other file,
and says of each engine which graph, weights and guard it was compiled from. An engine is loaded
from a folder that agrees with its list, and from no other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from guardbake.bundle.canonical import JSON, canonical_lines, parse
from guardbake.bundle.engine import Compiled, check_record
from guardbake.bundle.files import (
    FileEntry,
    compare,
    entries_from_json,
    entries_to_json,
    require_digest,
)
from guardbake.bundle.manifest import DECODER, read_manifest
from guardbake.bundle.verify import verify_bundle
from guardbake.errors import IntegrityError, MalformedError

ENGINES = "engines.json"
SCHEMA = 1
_REMEDY = "do not load these engines: build them again with guardbake build"
_KEYS = {"engine", "graph", "data", "guard", "nodes"}


@dataclass(frozen=True)
class EngineFolder:
    """files: all but the list itself, by sorted name. engines: in the order they were built."""

    files: tuple[FileEntry, ...]
    engines: tuple[Compiled, ...]

    def to_json(self) -> str:
        """The one spelling: sorted keys, two spaces, a newline at the end."""
        engines: list[JSON] = [
            {
                "engine": each.engine.name,
                "graph": entries_to_json([each.graph]),
                "data": entries_to_json(each.data),
                "guard": each.guard,
                "nodes": each.nodes,
            }
            for each in self.engines
        ]
        return canonical_lines(
            {"schema": SCHEMA, "files": entries_to_json(self.files), "engines": engines}
        )


def write_engine_folder(folder: Path, found: EngineFolder) -> None:
    """Write the list; `verify_engine_folder` is to be asked whether it is true."""
    (folder / ENGINES).write_text(found.to_json(), encoding="utf-8")


def verify_engine_folder(folder: Path, bundle: Path | None = None) -> EngineFolder:
    """Read every file of the folder and hold it to the list, and each record to its engine.

    bundle: also that each engine was compiled from a graph, weights and guard of this bundle, which
    is verified first. Raises IntegrityError at the first thing amiss.
    """
    try:
        found = _read(folder)
        compare(folder, found.files, ENGINES, lambda _: True)
        for each in found.engines:
            check_record(folder / f"{each.engine.name}.json", each)
    except MalformedError as error:
        raise IntegrityError(
            found=error.found, expected=error.expected, where=error.where, remedy=_REMEDY
        ) from error
    if bundle is not None:
        _check_origin(found, folder, bundle)
    return found


def _check_origin(found: EngineFolder, folder: Path, bundle: Path) -> None:
    verify_bundle(bundle)
    manifest = read_manifest(bundle)
    listed = set(manifest.files)
    for each in found.engines:
        for source in (each.graph, *each.data):
            if source not in listed:
                what = f"{each.engine.name} of another {source.name}"
                _amiss(what, f"an engine of the bundle {bundle}", folder)
        guard = manifest.origins.guard if each.graph.name == DECODER else None
        if each.guard != guard:
            _amiss(f"{each.engine.name} with guard {each.guard!s:.12}", f"{guard!s:.12}", folder)


def _read(folder: Path) -> EngineFolder:
    path = folder / ENGINES
    where = str(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        _amiss(f"no readable {ENGINES} ({error.strerror})", "engines that are listed", folder)
    value: Any = parse(data, where, _REMEDY)
    if not isinstance(value, dict) or value.get("schema") != SCHEMA:
        _amiss("something else", f"a list of schema {SCHEMA}", path)
    files = entries_from_json(value.get("files"), where)
    engines = value.get("engines")
    if not isinstance(engines, list) or not engines:
        _amiss("no engines", "a list of engines", path)
    found = EngineFolder(files, tuple(_engine(each, files, path) for each in engines))
    if found.to_json().encode() != data:
        _amiss("another spelling", "the bytes that guardbake writes", path)
    return found


def _engine(value: Any, files: Sequence[FileEntry], path: Path) -> Compiled:
    if not isinstance(value, dict) or set(value) != _KEYS:
        _amiss("an engine without its origin", f"the keys {', '.join(sorted(_KEYS))}", path)
    own = {entry.name: entry for entry in files}.get(str(value["engine"]))
    graph = entries_from_json(value["graph"], str(path))
    guard, nodes = value["guard"], value["nodes"]
    if own is None or len(graph) != 1:
        _amiss(f"an engine {value['engine']!r:.80}", "one of the files, and its one graph", path)
    if not isinstance(nodes, list) or not all(isinstance(node, str) for node in nodes):
        _amiss("nodes that are no names", "the guard's nodes by name", path)
    if guard is not None:
        require_digest(guard, str(path))
    return Compiled(own, graph[0], entries_from_json(value["data"], str(path)), guard, tuple(nodes))


def _amiss(found: str, expected: str, where: Path) -> NoReturn:
    raise IntegrityError(found=found, expected=expected, where=str(where), remedy=_REMEDY)
