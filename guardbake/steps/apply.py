"""ONNX in, guarded ONNX out. No PyTorch is imported and no weight is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from guardbake.artifact import load_guard, require_model, save_guard
from guardbake.bundle.folders import new_folder, refuse_existing
from guardbake.bundle.manifest import DECODER, GUARD
from guardbake.bundle.publish import share_weights
from guardbake.errors import UsageError
from guardbake.steps.records import read_record
from guardbake.steps.rewrite import rewrite

DESCRIPTION = "model.json"


def apply_guard(
    source: Path, guard: Path, out: Path, weights: Literal["link", "copy"]
) -> dict[str, Any]:
    """`out` gets the rewritten decoder, the guard pack and everything else of `source`.

    Raises SiteError when the guard does not fit the graph, IntegrityError when it was fitted for
    another model, UsageError if `out` exists. `out` appears whole or not at all; `source` is only
    read, though with "link" its weights become hard links (see `share_weights`).
    """
    refuse_existing(out)  # before any work; new_folder looks again
    if not (source / DECODER).is_file():
        raise UsageError(
            found=f"no {DECODER}",
            expected="a folder with an exported decoder",
            where=str(source),
            remedy="name the folder that holds decoder.onnx and its weights",
        )
    spec = load_guard(guard)
    if (source / DESCRIPTION).is_file():  # written by our exporter; foreign folders have none
        digest = read_record(source / DESCRIPTION).get("model_digest")
        require_model(spec, str(digest), str(source))
    with new_folder(out) as folder:
        inserted = rewrite(source / DECODER, spec, folder / DECODER)
        for path in sorted(source.iterdir()):
            if path.is_file() and path.name != DECODER:
                share_weights(path, folder / path.name, weights)
        save_guard(spec, folder / GUARD)
    return inserted
