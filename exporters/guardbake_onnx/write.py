"""Write graphs and their description into a folder. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import onnx_ir as ir

from guardbake.bundle.canonical import canonical_lines
from guardbake.bundle.files import FileEntry, entries_to_json
from guardbake.bundle.publish import share_weights

from guardbake_onnx.description import FILE_NAME, Description

# bytes; smaller tensors stay in the graph, where a reader and a parser find them at once
EXTERNAL_FROM = 1024
WEIGHTS = "weights.json"


def write_model(graphs: Mapping[str, ir.Model], description: Description, folder: Path) -> None:
    """Write <name>.onnx and <name>.onnx.data for each graph, and model.json, into a folder.

    The bytes depend on the arguments alone.
    """
    for name, model in sorted(graphs.items()):
        write_graph(model, folder / f"{name}.onnx")
    (folder / FILE_NAME).write_text(description.to_json(), encoding="utf-8")


def write_linked(
    graphs: Mapping[str, ir.Model],
    description: Description,
    folder: Path,
    files: Sequence[tuple[Path, str]],
) -> None:
    """Write <name>.onnx, model.json and weights.json beside files that hold the weights.

    files: the weights files and their sha256; they become hard links, which onnxruntime reads and
    onnx and onnx-ir refuse to. weights.json says what they must be. Raises UsageError if the folder
    is on another file system.
    """
    for name, model in sorted(graphs.items()):
        ir.save(model, folder / f"{name}.onnx")
    for file, _ in files:
        share_weights(file, folder / file.name, "link")
    entries = [FileEntry(file.name, file.stat().st_size, sha256) for file, sha256 in files]
    record = canonical_lines({"format": 1, "files": entries_to_json(entries)})
    (folder / WEIGHTS).write_text(record, encoding="utf-8")
    (folder / FILE_NAME).write_text(description.to_json(), encoding="utf-8")


def write_graph(model: ir.Model, path: Path) -> None:
    """Write one graph; tensors of 1 KiB and more go to <path>.data."""
    ir.save(model, path, external_data=f"{path.name}.data", size_threshold_bytes=EXTERNAL_FROM)
