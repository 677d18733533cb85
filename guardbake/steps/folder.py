"""A folder with an exported model, ours or another tool's: its files, its decoders, its runtime.

Nothing in it is trusted: links, data outside the folder, data that is short or laid over other data
are refused before any graph is changed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NoReturn

import onnx_ir as ir

from guardbake.bundle.data import external_tensors, stored_bytes
from guardbake.bundle.files import list_files
from guardbake.errors import IntegrityError, MalformedError, UsageError
from guardbake.steps.runtimes import Runtime, runtime_of

Load = Callable[[Path], ir.Model]
_SHOWN = 120  # characters of a name in an error


@dataclass(frozen=True)
class ModelFolder:
    """path; files: every file below it, by relative name; decoders: the graphs that give logits.

    All of the decoders are to be guarded: one left as it was would be a way round the guard.
    """

    path: Path
    files: tuple[str, ...]
    decoders: tuple[str, ...]
    runtime: Runtime


def read_folder(path: Path, load: Load) -> ModelFolder:
    """Read what an exporter wrote. load: reads one graph.

    Raises UsageError if there is no decoder in it, MalformedError at what cannot be trusted.
    """
    files = _plain_files(path) if path.is_dir() else ()
    graphs = {name: load(path / name) for name in files if name.endswith(".onnx")}
    for name, model in graphs.items():
        _check_data(model, path / name)
    decoders = {name: model for name, model in graphs.items() if _is_decoder(model)}
    if not decoders:
        raise UsageError(
            found=f"{len(graphs)} ONNX graphs, none that gives logits for embeddings or token ids",
            expected="a folder with an exported decoder",
            where=str(path),
            remedy="name the folder that the exporter wrote, decoder.onnx or model.onnx in it",
        )
    runtime = runtime_of(files, list(decoders.values()))
    return ModelFolder(path, files, tuple(decoders), runtime)


def _is_decoder(model: ir.Model) -> bool:
    given = {value.name for value in model.graph.inputs}
    gives = {value.name for value in model.graph.outputs}
    return "logits" in gives and bool(given & {"input_ids", "inputs_embeds"})


def _plain_files(path: Path) -> tuple[str, ...]:
    try:
        return tuple(list_files(path))
    except IntegrityError as error:
        _refuse(error.found, error.expected, path, "copy the folder with its links resolved")


def _check_data(model: ir.Model, path: Path) -> None:
    """External data lies whole in plain files beside the graph, and no tensor on another's."""
    places: dict[str, set[tuple[int, int]]] = {}
    for tensor in external_tensors(model):
        location, start = str(tensor.location), tensor.offset or 0
        needed = stored_bytes(tensor, path)
        end, what = start + needed, f"{str(tensor.name)[:_SHOWN]!r}"
        if location in ("", ".", "..") or location != Path(location).name or "\\" in location:
            _amiss(f"{what} at {location[:_SHOWN]!r}", "the name of a file beside the graph", path)
        file = path.parent / location
        size = file.stat().st_size if file.is_file() else -1
        if start < 0 or end > size:
            there = f"its {size} bytes" if size >= 0 else "a file that is not there"
            _amiss(f"{what} at bytes {start} to {end} of {location}", f"bytes of {there}", path)
        if tensor.length not in (None, needed):
            _amiss(f"{what} of {tensor.length} bytes", f"{needed}, by its shape", path)
        places.setdefault(location, set()).add((start, end))
    for location, ranges in places.items():  # the same place twice is one tensor shared
        ordered = sorted(each for each in ranges if each[0] < each[1])
        for (_, end), (start, _) in pairwise(ordered):
            if start < end:
                found = f"tensors that overlap at byte {start} of {location}"
                _amiss(found, "tensors side by side", path)


def _amiss(found: str, expected: str, path: Path) -> NoReturn:
    _refuse(found, expected, path, "export the model again, or copy all of it")


def _refuse(found: str, expected: str, where: Path, remedy: str) -> NoReturn:
    raise MalformedError(found=found, expected=expected, where=str(where), remedy=remedy)


@contextmanager
def unchanged(path: Path) -> Iterator[None]:
    """IntegrityError after the body if a file below `path` was changed, added or removed in it."""
    before = _states(path)
    yield
    after = _states(path)
    changed = sorted(name for name in before | after if before.get(name) != after.get(name))
    if changed:
        raise IntegrityError(
            found=f"{changed[0]!r:.120} changed while it was being read",
            expected="a folder that nobody writes to",
            where=str(path),
            remedy="let the export finish, and run the command again",
        )


def _states(path: Path) -> dict[str, tuple[int, int, int]]:
    """Inode, size and time of the last change of the content, of every file."""
    states = {}
    for root, _, names in os.walk(path):
        for name in names:
            state = os.stat(os.path.join(root, name), follow_symlinks=False)
            states[os.path.join(root, name)] = state.st_ino, state.st_size, state.st_mtime_ns
    return states
