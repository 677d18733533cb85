"""Write graphs and their description as one folder, whole or not at all. No torch."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import onnx_ir as ir

from guardbake.errors import ResourceFault, UsageError

from guardbake_onnx.description import FILE_NAME, Description

# bytes; smaller tensors stay in the graph, where a reader and a parser find them at once
EXTERNAL_FROM = 1024


def write_model(graphs: Mapping[str, ir.Model], description: Description, folder: Path) -> Path:
    """Write <name>.onnx and <name>.onnx.data for each graph, and model.json, into a new folder.

    The bytes depend on the arguments alone. Everything is written beside the folder first and
    renamed at the end; a failure leaves nothing. Raises UsageError if the folder exists,
    ResourceFault if the disk is full.
    """
    if folder.exists():
        raise UsageError(
            found="something there already",
            expected="a folder that does not exist yet",
            where=str(folder),
            remedy="choose another folder, or remove this one",
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.parent / f".{folder.name}.partial-{os.getpid()}"
    shutil.rmtree(partial, ignore_errors=True)  # of a killed process with the same number
    partial.mkdir()
    try:
        for name, model in sorted(graphs.items()):
            write_graph(model, partial / f"{name}.onnx")
        (partial / FILE_NAME).write_text(description.to_json(), encoding="utf-8")
        for path in partial.iterdir():
            _flush(path)
        partial.rename(folder)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise ResourceFault(
            found=str(error),
            expected="room for the model",
            where=str(folder.parent),
            remedy="free some space, or choose another disk",
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def write_graph(model: ir.Model, path: Path) -> None:
    """Write one graph; tensors of 1 KiB and more go to <path>.data."""
    ir.save(model, path, external_data=f"{path.name}.data", size_threshold_bytes=EXTERNAL_FROM)


def _flush(path: Path) -> None:
    with path.open("rb") as handle:
        os.fsync(handle.fileno())
