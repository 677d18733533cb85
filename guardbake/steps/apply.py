"""ONNX in, guarded ONNX out. No PyTorch is imported and no weight is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from guardbake.artifact import load_guard, require_model, save_guard
from guardbake.bundle.files import describe
from guardbake.bundle.folders import new_folder, refuse_existing
from guardbake.bundle.manifest import DECODER, GUARD
from guardbake.bundle.publish import share_weights
from guardbake.errors import IntegrityError, UsageError
from guardbake.steps.records import read_record
from guardbake.steps.rewrite import fold, rewrite, verify_rewritten

DESCRIPTION = "model.json"


def apply_guard(
    source: Path, guard: Path, out: Path, weights: Literal["link", "copy"], folded: bool = False
) -> dict[str, Any]:
    """`out` gets the rewritten decoder, the guard pack and everything else of `source`.

    folded: the guard goes into the weights (see `passes.fold`), and the report names no nodes.
    Raises SiteError when the guard does not fit the graph, UnsupportedError when it cannot be
    folded, IntegrityError when it was fitted for another model, UsageError if `out` exists. `out`
    appears whole or not at all; `source` is only read, though with "link" its weights become hard
    links (see `share_weights`).
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
        write = fold if folded else rewrite
        report = write(source / DECODER, spec, folder / DECODER)
        for path in sorted(source.iterdir()):
            if path.is_file() and path.name != DECODER:
                share_weights(path, folder / path.name, weights)
        save_guard(spec, folder / GUARD)
    return report


def verify_applied(folder: Path, source: Path) -> str:
    """Check that `folder` is what `apply_guard` makes of `source`; says how it carries its guard.

    The guard is put into the graph of `source` again, as nodes or folded, and the two are compared.
    All other files are the source's, byte for byte. Raises IntegrityError at the first that is not.
    """
    spec = load_guard(folder / GUARD)
    folded = verify_rewritten(folder / DECODER, spec, source / DECODER)
    for path in sorted(source.iterdir()):
        twin = folder / path.name
        if not path.is_file() or path.name == DECODER:
            continue
        if not twin.is_file() or not _same_bytes(path, twin):
            raise IntegrityError(
                found=f"another {path.name}" if twin.is_file() else f"no {path.name}",
                expected=f"the file of {source}",
                where=str(folder),
                remedy="do not ship this folder: apply the guard to the unguarded export again",
            )
    where = ", ".join(str(edit.site) for edit in spec.edits)
    return f"guard {spec.digest[:12]} {'folded into' if folded else 'present at'} {where}"


def _same_bytes(one: Path, other: Path) -> bool:
    return one.samefile(other) or describe(one.parent, one.name) == describe(
        other.parent, other.name
    )
