"""From a checkpoint folder to unguarded graphs; its weights are never all in memory."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

from guardbake.bundle.canonical import JSON
from guardbake.bundle.folders import new_folder, refuse_existing
from guardbake.collector import no_collection
from guardbake.errors import IntegrityError
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


def capture(checkpoint: Path, number: Number, stages: Stages) -> Path:
    """The graphs without weights, captured once for every configuration.

    Raises IntegrityError if the configuration changes meanwhile.
    """
    return _capture(checkpoint, number, stages, _capture_key(checkpoint, number, stages), None)


def _capture(
    checkpoint: Path,
    number: Number,
    stages: Stages,
    key: dict[str, JSON],
    ahead: Ahead | None,
) -> Path:
    exporter, config = find_exporter("onnx"), checkpoint / CONFIG

    def build(folder: Path) -> None:
        exporter.capture(checkpoint, number, folder, ahead)
        if file_digest(config) != key["config"]:
            raise IntegrityError(
                found="another configuration than a moment ago",
                expected="a checkpoint that nothing writes to",
                where=str(config),
                remedy="wait until the checkpoint is complete, and run it again",
            )

    return stages.stage("capture", key, build)


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
    key = _capture_key(checkpoint, number, stages)
    helped = _several_cores() and not stages.workspace.stage("capture", key).done
    begun = find_exporter("onnx").ahead(checkpoint, number) if helped else nullcontext()
    with no_collection(), ThreadPoolExecutor(max_workers=1) as beside, begun as ahead:
        hashing = beside.submit(hash_files, checkpoint)
        from guardbake.vlm.load import read_config  # and PyTorch, which takes seconds

        read_config(checkpoint)
        captured = _capture(checkpoint, number, stages, key, ahead)
        files = hashing.result()
    with new_folder(out) as folder:
        write_export(files, captured, storage, folder, target)


def _several_cores() -> bool:
    """Whether a second process would have a core for itself."""
    if hasattr(os, "sched_getaffinity"):  # not on every system
        return len(os.sched_getaffinity(0)) > 1
    return (os.cpu_count() or 1) > 1


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
