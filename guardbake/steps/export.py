"""From a checkpoint folder to unguarded graphs; its weights are never all in memory."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from guardbake.bundle.canonical import JSON
from guardbake.bundle.folders import new_folder, refuse_existing
from guardbake.collector import no_collection
from guardbake.plugins import Ahead, Number, Storage, Target, find_exporter
from guardbake.progress import Reporter
from guardbake.steps.records import code_digest, file_digest, folder_digest
from guardbake.steps.staging import Stages, StagesBeside
from guardbake.vlm.files import (
    CONFIG,
    CheckpointFiles,
    check_weights,
    checkpoint_folder,
    family_at,
    hash_files,
)


def checkpoint_at(folder: Path, stages: Stages) -> Path:
    """The folder itself; a delta is made into a checkpoint folder first."""
    if not (folder / "delta.toml").is_file():
        return folder
    from guardbake.vlm.delta import materialise

    key: dict[str, JSON] = {"delta": folder_digest(folder), **stages.versions("model")}

    def build(target: Path) -> None:
        materialise(folder, target / "checkpoint")

    return stages.stage("model", key, build) / "checkpoint"


def capture(checkpoint: Path, number: Number, stages: Stages, ahead: Ahead | None = None) -> Path:
    """The graphs without weights, captured once for every configuration."""
    exporter = find_exporter("onnx")

    def build(folder: Path) -> None:
        exporter.capture(checkpoint, number, folder, ahead)

    return stages.stage("capture", _capture_key(checkpoint, number, stages), build)


def _capture_key(checkpoint: Path, number: Number, stages: Stages) -> dict[str, JSON]:
    return {
        "config": file_digest(checkpoint / CONFIG),
        "number": number,
        "exporter": exporter_digest(),
        **stages.versions("capture"),
    }


def exporter_digest() -> str:
    """sha256 of the exporter's modules, which are a package of their own."""
    return code_digest(type(find_exporter("onnx")).__module__)


def export_checkpoint(
    named: str, out: Path, storage: Storage, number: Number, target: Target, reporter: Reporter
) -> None:
    """Write the unguarded graphs of a checkpoint to the new folder `out`, as a bake does.

    named: a checkpoint folder, a folder with a delta.toml, or the id of a model cached here.
    target: whose files they become. The checkpoint is hashed while its graphs are captured. Raises
    UsageError (no checkpoint, `out` exists), UnsupportedError, MalformedError, IntegrityError (it
    changed meanwhile).
    """
    refuse_existing(out)
    stages = StagesBeside(out, reporter)
    checkpoint = checkpoint_folder(str(checkpoint_at(Path(named), stages)), allow_network=False)
    family_at(checkpoint)
    find_exporter("onnx").admit(checkpoint, number, storage, target)
    check_weights(checkpoint)  # before any work
    with (
        no_collection(),
        _ahead(checkpoint, number, stages) as ahead,
        ThreadPoolExecutor(max_workers=1) as beside,
    ):
        hashing = beside.submit(hash_files, checkpoint)
        from guardbake.vlm.load import read_config  # and PyTorch, which takes seconds

        read_config(checkpoint)
        captured = capture(checkpoint, number, stages, ahead)
        files = hashing.result()
    with new_folder(out) as folder:
        write_export(files, captured, storage, folder, target)


def _ahead(
    checkpoint: Path, number: Number, stages: StagesBeside
) -> AbstractContextManager[Ahead | None]:
    """Capture begun in a second process, where there is a core for it and something to do."""
    captured = stages.workspace.stage("capture", _capture_key(checkpoint, number, stages))
    if captured.done or len(os.sched_getaffinity(0)) == 1:
        return nullcontext()
    return find_exporter("onnx").ahead(checkpoint, number)


def write_export(
    files: CheckpointFiles,
    captured: Path,
    storage: Storage,
    folder: Path,
    target: Target = "ort",
) -> None:
    """Write the model into a folder that is dropped on any error, such as a checkpoint's change."""
    find_exporter("onnx").export(files, captured, storage, folder, target)
    files.require_unchanged()
