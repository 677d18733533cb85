"""Engines of a model that is already there: a bundle, a folder with guarded graphs, or one graph.

The source is only read. What is built stands in a folder of its own with its list, see
`bundle.engine_folder`, and nothing is built of a decoder whose guard has not been verified.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NoReturn

import onnx_ir as ir
from pydantic import ValidationError

from guardbake.artifact import load_guard
from guardbake.bundle.data import external_tensors
from guardbake.bundle.engine import Compiled
from guardbake.bundle.engine_folder import (
    EngineFolder,
    verify_engine_folder,
    write_engine_folder,
)
from guardbake.bundle.files import FileEntry, describe, list_files
from guardbake.bundle.folders import new_folder, refuse_existing
from guardbake.bundle.graphs import load_graph
from guardbake.bundle.manifest import GUARD, MANIFEST, RECIPE
from guardbake.bundle.verify import verify_bundle
from guardbake.errors import EnvironmentFault, MalformedError, UnsupportedError, UsageError
from guardbake.passes.branches import switch_of
from guardbake.passes.functions import DOMAIN
from guardbake.passes.insert import DIGEST_KEY, FOLD_KEY
from guardbake.passes.verify import VerifyGuard
from guardbake.plugins import EngineBuilder, EngineSizes, EngineTask, Number, find_engine_builder
from guardbake.progress import Reporter
from guardbake.recipe_engine import EngineSection
from guardbake.spec import GuardSpec
from guardbake.steps.folder import read_folder, unchanged
from guardbake.steps.records import read_record


@dataclass(frozen=True)
class EngineOrder:
    """What to build.

    backend: name of an `EngineBuilder`. only: names of graphs, without .onnx; all if empty. guard:
    the pack, if it does not lie in the source. unguarded: take a decoder without a guard as well.
    number, capacity: of decoders, see `plugins.EngineTask`.
    """

    backend: str
    capabilities: tuple[str, ...]
    sizes: EngineSizes
    only: tuple[str, ...] = ()
    guard: Path | None = None
    unguarded: bool = False
    number: Number = "float32"
    capacity: int | None = None


def settings_in(source: Path) -> EngineSection | None:
    """The engine section of the recipe that a bundle was baked by; None where there is none."""
    if not (source / RECIPE).is_file():
        return None
    section = read_record(source / RECIPE).get("engine")
    try:
        return None if section is None else EngineSection.model_validate(section)
    except ValidationError as error:
        raise MalformedError(
            found=f"an engine section with {error.error_count()} faults",
            expected="the recipe of the bake",
            where=str(source / RECIPE),
            remedy="bake the bundle again",
        ) from error


def number_of(section: EngineSection | None) -> Number:
    """What a recipe says that its engine computes in; float32 leaves it to the graph."""
    return "float32" if section is None or section.number is None else section.number


def sizes_of(section: EngineSection | None) -> EngineSizes:
    """What a recipe says of an engine's sizes, and the defaults for what it does not say."""
    named = {field.name: getattr(section, field.name, None) for field in fields(EngineSizes)}
    return EngineSizes(**{name: tuple(given) for name, given in named.items() if given})


def build_engines(
    source: Path, out: Path, order: EngineOrder, reporter: Reporter
) -> dict[str, dict[str, Any]]:
    """Compile the graphs of `source` into the new folder `out`; returns the records by engine.

    source: a bundle, which is verified first, another folder with a decoder, or an ONNX file.
    Raises UsageError about the order, UnsupportedError about a graph or a GPU, IntegrityError if a
    guard is not what its pack says, EnvironmentFault and ResourceFault about the machine. `out`
    appears whole or not at all.
    """
    builder = _require(source, out, order)
    with unchanged(source):
        tasks = list(_tasks(source, order))
        with new_folder(out) as folder:
            for task in tasks:
                reporter.begin(task.name)
                started = time.monotonic()
                builder.build(task, folder, reporter.advance)
                reporter.end(task.name, time.monotonic() - started, False)
            entries = {name: describe(folder, name) for name in list_files(folder)}
            built = tuple(_compiled(t, source, entries[f"{t.name}.engine"]) for t in tasks)
            write_engine_folder(folder, EngineFolder(tuple(entries.values()), built))
            verify_engine_folder(folder, source if (source / MANIFEST).is_file() else None)
    return {f"{t.name}.engine": read_record(out / f"{t.name}.engine.json") for t in tasks}


def prepare_engines(source: Path, out: Path, order: EngineOrder) -> tuple[str, ...]:
    """Write the graphs as the compiler would get them into the new folder `out`.

    Returns a shell command a graph, to be run in `out`, that compiles it with the backend's own
    tool. Raises as `build_engines` does.
    """
    builder = _require(source, out, order)
    with unchanged(source), new_folder(out) as folder:
        return tuple(builder.prepare(task, folder) for task in _tasks(source, order))


def _require(source: Path, out: Path, order: EngineOrder) -> EngineBuilder:
    refuse_existing(out)  # before any work; new_folder looks again
    if not source.exists():
        _refuse("no such file or folder", "a bundle, an exported model or an ONNX file", source)
    if source.is_dir() and out.resolve().is_relative_to(source.resolve()):
        _refuse(f"{out}, inside the source", "a place beside it: the source stays as it is", source)
    builder = find_engine_builder(order.backend)
    missing = builder.missing()
    if missing is not None:
        raise EnvironmentFault(
            found=missing,
            expected="an installed engine builder",
            where=f"the engine backend {order.backend}",
            remedy="install it, or name another backend",
        )
    return builder


def _folder_of(source: Path) -> Path:
    return source if source.is_dir() else source.parent


def _tasks(source: Path, order: EngineOrder) -> Iterator[EngineTask]:
    """One task a graph, decoders first: they are the largest, and what may fail fails early."""
    folder = _folder_of(source)
    if (source / MANIFEST).is_file():
        verify_bundle(source)
    spec = _spec(order.guard or folder / GUARD, given=order.guard is not None)
    for name, path in _graphs(source, order):
        model = load_graph(path)
        guard, nodes = _guard_in(model, path, spec, order.unguarded)
        task = EngineTask(path, name, order.capabilities, order.sizes, guard, nodes)
        decodes = _decodes(model)
        yield replace(task, number=order.number, capacity=order.capacity) if decodes else task


def _graphs(source: Path, order: EngineOrder) -> list[tuple[str, Path]]:
    if source.is_file():
        return [(source.stem, source)]
    found = read_folder(source, load_graph)
    names = [*found.decoders, *(n for n in found.files if n.endswith(".onnx"))]
    graphs = {name.removesuffix(".onnx"): source / name for name in dict.fromkeys(names)}
    unknown = sorted(set(order.only) - set(graphs))
    if unknown:
        _refuse(f"no graph {unknown[0]!r}", f"one of {', '.join(graphs)}", source)
    return [(name, path) for name, path in graphs.items() if not order.only or name in order.only]


def _spec(path: Path, given: bool) -> GuardSpec | None:
    return load_guard(path) if given or path.is_file() else None


def _guard_in(
    model: ir.Model, path: Path, spec: GuardSpec | None, unguarded: bool
) -> tuple[str | None, tuple[str, ...]]:
    """The digest and the nodes of the guard that the graph carries, verified against its pack."""
    if FOLD_KEY in model.metadata_props:
        raise UnsupportedError(
            found="a guard folded into the weights",
            expected="a guard of nodes, whose presence in an engine can be proved",
            where=str(path),
            remedy="apply the guard without --fold, and build from that",
        )
    if switch_of(model) is not None:
        raise UnsupportedError(
            found="a decoder in each branch of an If",
            expected="one decoder, whatever the cache holds",
            where=str(path),
            remedy="export without merging the decoders of the first call and of the later ones",
        )
    carries = DIGEST_KEY in model.metadata_props or any(n.domain == DOMAIN for n in model.graph)
    if not carries and _decodes(model) and not unguarded:
        _refuse(
            "a decoder without a guard",
            "a guarded one",
            path,
            "put a guard in with guardbake apply, or say --unguarded",
        )
    if not carries:
        return None, ()
    if spec is None:
        _refuse("a guard, and no pack to hold it to", "its pack", path, "name it with --guard")
    return spec.digest, VerifyGuard(spec, str(path))(model).nodes


def _decodes(model: ir.Model) -> bool:
    return any(value.name == "logits" for value in model.graph.outputs)


def _compiled(task: EngineTask, source: Path, engine: FileEntry) -> Compiled:
    root = _folder_of(source)
    data = {str(tensor.location) for tensor in external_tensors(load_graph(task.graph))}
    beside = task.graph.parent.relative_to(root)
    return Compiled(
        engine,
        describe(root, task.graph.relative_to(root).as_posix()),
        tuple(describe(root, (beside / name).as_posix()) for name in sorted(data)),
        task.guard,
        task.nodes,
    )


def _refuse(
    found: str, expected: str, where: Path, remedy: str = "correct the command"
) -> NoReturn:
    raise UsageError(found=found, expected=expected, where=str(where), remedy=remedy)
