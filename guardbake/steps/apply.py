"""ONNX in, guarded ONNX out. No PyTorch is imported; weights are read by the self-check alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from guardbake.artifact import load_guard, require_model, save_guard
from guardbake.bundle.folders import new_folder, refuse_existing
from guardbake.bundle.graphs import load_graph
from guardbake.bundle.manifest import GUARD
from guardbake.bundle.publish import share_weights
from guardbake.errors import IntegrityError, MalformedError, UnsupportedError
from guardbake.plugins import OpenSession
from guardbake.spec import GuardSpec
from guardbake.steps.carriers import carrier_of
from guardbake.steps.feeds import head_size_of
from guardbake.steps.folder import ModelFolder, read_folder, unchanged
from guardbake.steps.records import file_digest, read_record, write_record
from guardbake.steps.rewrite import fold, load_decoder, rewrite, verify_rewritten
from guardbake.steps.runtimes import RUNTIMES, Runtime, RuntimeName, require_fit
from guardbake.steps.self_check import self_check

DESCRIPTION = "model.json"
APPLIED = "applied.json"
NOT_CHECKED = "not run: --no-self-check"
FOLDED = "not run: folded into the weights, which were computed a second time and compared"


Weights = Literal["link", "copy"]


@dataclass(frozen=True)
class _Application:
    """How a guard is put on: the arguments of `apply_guard`."""

    weights: Weights
    folded: bool
    runtime: RuntimeName | None
    session: OpenSession | None
    revalidation: Mapping[str, Any] | None


def apply_guard(
    source: Path,
    guard: Path,
    out: Path,
    weights: Weights,
    folded: bool = False,
    runtime: RuntimeName | None = None,
    session: OpenSession | None = None,
    revalidation: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """`out` gets the rewritten decoders, the guard pack, a record and all other files of `source`.

    weights: files that do not change become hard links, or copies. folded: the guard goes into the
    weights (see `passes.fold`). runtime: whose loop runs the decoder, None for what the folder
    tells. session: runs the numeric self-check, None to leave it out, which is put on record.
    revalidation: what was compared when the guard's thresholds were set for this decoder, put on
    record, too.
    Returns the record. Raises SiteError when the guard does not fit a graph, UnsupportedError when
    the runtime cannot carry it or it cannot be folded, ParityError when the self-check fails,
    IntegrityError when the guard was fitted for another model or `source` changes meanwhile,
    MalformedError when `source` cannot be trusted, UsageError if `out` exists. `out` appears whole
    or not at all; `source` is only read, though with "link" its weights become hard links (see
    `share_weights`).
    """
    refuse_existing(out)  # before any work; new_folder looks again
    how = _Application(weights, folded, runtime, session, revalidation)
    spec = load_guard(guard)
    with unchanged(source):
        folder = read_folder(source, load_graph)
        _require_model(folder, spec)
        with new_folder(out) as target:
            record = _write(folder, spec, target, how)
    return record


def _require_model(folder: ModelFolder, spec: GuardSpec) -> None:
    """A folder of ours says which model it is; of another's, width and layers are what is known."""
    if DESCRIPTION in folder.files:
        digest = read_record(folder.path / DESCRIPTION).get("model_digest")
        require_model(spec, str(digest), str(folder.path))
    taken = sorted({GUARD, APPLIED} & set(folder.files))
    if taken:
        raise UnsupportedError(
            found=f"{taken[0]} among the files of the source",
            expected="a folder without a guard",
            where=str(folder.path),
            remedy="start from the unguarded export",
        )


def _write(folder: ModelFolder, spec: GuardSpec, target: Path, how: _Application) -> dict[str, Any]:
    runtime = RUNTIMES[how.runtime] if how.runtime is not None else folder.runtime
    carrier = carrier_of(runtime, folder, spec)
    slot = carrier.slot
    for name in folder.files:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        if name in carrier.changed:
            (target / name).write_bytes(carrier.changed[name])
        elif name not in folder.decoders:
            share_weights(folder.path / name, target / name, how.weights)
    decoders = {}
    for name in folder.decoders:
        before = load_decoder(folder.path / name)
        if how.folded:
            report = fold(folder.path / name, spec, target / name)
        else:
            report = rewrite(folder.path / name, spec, target / name, slot)
        after = load_graph(target / name)
        require_fit(runtime, before.graph, after.graph, spec.profile, slot)
        report["self_check"] = FOLDED if how.folded else NOT_CHECKED
        if how.session is not None and not how.folded:
            data = (folder.path / name).parent
            report["self_check"] = self_check(
                before, after, spec, data, how.session, head_size_of(folder.path), slot
            )
        decoders[name] = report
    record: dict[str, Any] = {"guard": spec.digest, "runtime": runtime.name, "decoders": decoders}
    if how.revalidation is not None:
        record["revalidation"] = dict(how.revalidation)
    write_record(target / APPLIED, record)
    save_guard(spec, target / GUARD)
    return record


def verify_applied(path: Path, source: Path) -> str:
    """Check that `path` is what `apply_guard` makes of `source`; says how it carries its guard.

    The guard is put into each decoder of `source` again, as nodes or folded, and the two are
    compared. All other files are the source's, byte for byte, but for those that the loop needs
    otherwise to carry the guard's state. Raises IntegrityError at the first that is not.
    """
    spec = load_guard(path / GUARD)
    folder = read_folder(source, load_graph)
    carrier = carrier_of(_runtime(path, folder), folder, spec)
    for name in folder.files:
        twin = path / name
        same = twin.is_file() and (
            name in folder.decoders or _same_bytes(twin, source / name, carrier.changed.get(name))
        )
        if not same:
            raise IntegrityError(
                found=f"another {name}" if twin.is_file() else f"no {name}",
                expected=f"the file of {source}",
                where=str(path),
                remedy="do not ship this folder: apply the guard to the unguarded export again",
            )
    slot = carrier.slot
    folded = [verify_rewritten(path / name, spec, source / name, slot) for name in folder.decoders]
    where = ", ".join(str(edit.site) for edit in spec.edits)
    return f"guard {spec.digest[:12]} {'folded into' if all(folded) else 'present at'} {where}"


def _runtime(path: Path, folder: ModelFolder) -> Runtime:
    """The runtime that `path` was written for, by its record; without one, the folder's."""
    if not (path / APPLIED).is_file():
        return folder.runtime
    name = read_record(path / APPLIED).get("runtime")
    if name not in RUNTIMES:
        raise MalformedError(
            found=f"runtime {name!r:.60}",
            expected=f"one of {', '.join(sorted(RUNTIMES))}",
            where=str(path / APPLIED),
            remedy="apply the guard to the unguarded export again",
        )
    return RUNTIMES[name]


def _same_bytes(twin: Path, original: Path, changed: bytes | None) -> bool:
    """Whether `twin` holds what `original` does, or what that was changed to."""
    if changed is not None:
        return twin.read_bytes() == changed
    return twin.samefile(original) or file_digest(twin) == file_digest(original)
