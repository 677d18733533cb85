"""GuardSpec <-> one safetensors file, the guard pack. Loading refuses rather than repairs.

The file's metadata holds `guardbake` (the canonical header) and `digest` (the spec's digest); the
tensors carry the names of `spec.tensors`. Nothing in it is ever executed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from guardbake.errors import GuardbakeError, IntegrityError, MalformedError
from guardbake.nesting import too_deep
from guardbake.site import site_from_str
from guardbake.spec import (
    POLARITY,
    VERSION,
    Branch,
    Edit,
    GuardSpec,
    ModelIdentity,
    Reading,
    Sensor,
    header,
    header_json,
    tensors,
)
from guardbake.values import Vector

MAX_HEADER = 1 << 20  # a guard's header is kilobytes; anything larger is not ours
MAX_TENSORS = 4096  # two subspaces at every layer of a model of hundreds of layers are fewer


def save_guard(spec: GuardSpec, path: Path) -> None:
    """Write the guard pack: same spec, same bytes; appears complete or not at all."""
    arrays = {name: np.ascontiguousarray(array) for name, array in tensors(spec).items()}
    data = safetensors_bytes(arrays, {"guardbake": header_json(spec), "digest": spec.digest})
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_bytes(data)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def safetensors_bytes(arrays: Mapping[str, npt.NDArray[Any]], meta: Mapping[str, str]) -> bytes:
    """The file of these arrays and this metadata: equal ones are equal bytes.

    The library writes metadata in an order that changes from run to run; here it is sorted.
    """
    data = save(dict(arrays), dict(meta))
    stop = 8 + int.from_bytes(data[:8], "little")
    head = json.dumps(json.loads(data[8:stop]), sort_keys=True, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)  # arrays start at a multiple of 8, as the library has it
    return len(head).to_bytes(8, "little") + head + data[stop:]


def load_guard(path: Path) -> GuardSpec:
    """Read a guard pack written by `save_guard`.

    Raises MalformedError if it is not one, IntegrityError if its content is not what its digest
    says.
    """
    head, digest, arrays = _read(path)
    try:
        spec = _spec_from(head, arrays)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise _malformed(path, f"a header that lacks, adds or mistypes {error}") from error
    if spec.digest != digest:
        raise IntegrityError(
            found=f"content with digest {spec.digest[:16]}",
            expected=f"digest {digest[:16]}, which the pack states",
            where=str(path),
            remedy="the pack was altered after it was written: take it from its source again",
        )
    return spec


def _malformed(path: Path, found: str) -> GuardbakeError:
    return MalformedError(
        found=found,
        expected=f"a guard pack of version {VERSION}",
        where=str(path),
        remedy="write it again with guardbake fit",
    )


def _read(path: Path) -> tuple[dict[str, Any], str, dict[str, Vector]]:
    try:
        with path.open("rb") as file:
            if int.from_bytes(file.read(8), "little") > MAX_HEADER:
                raise _malformed(path, "a header of more than 1 MiB")
        with safe_open(str(path), framework="np") as pack:
            meta = pack.metadata() or {}
            names = list(pack.keys())
            if len(names) > MAX_TENSORS:
                raise _malformed(path, f"{len(names)} tensors")
            # numpy has no name for some of the format's dtypes, and says so in many ways
            strange = [n for n in names if pack.get_slice(n).get_dtype() != "F32"]
            if strange:
                raise _malformed(path, f"tensors that are not float32: {strange[:4]}")
            arrays = {name: pack.get_tensor(name) for name in names}
    except OSError as error:
        raise _malformed(path, f"an unreadable file ({error.strerror or error})") from error
    except SafetensorError as error:
        raise _malformed(path, f"a broken safetensors file ({error})") from error
    if "guardbake" not in meta or "digest" not in meta:
        raise _malformed(path, "a safetensors file without guardbake metadata")
    try:
        head = json.loads(meta["guardbake"])
    except (ValueError, RecursionError) as error:
        raise _malformed(path, f"a header that is not JSON ({error})") from error
    if too_deep(head):
        raise _malformed(path, "a header nested too deeply")
    if not isinstance(head, dict) or head.get("version") != VERSION:
        raise _malformed(path, "another version of the format")
    if head.get("polarity") != POLARITY:
        raise _malformed(path, f"polarity {head.get('polarity')!r}")
    return head, meta["digest"], arrays


def _spec_from(head: dict[str, Any], arrays: dict[str, Vector]) -> GuardSpec:
    sensors = []
    for gate, entry in enumerate(head["sensors"]):
        readings = tuple(
            Reading(
                site_from_str(name),
                arrays[f"sensor.{gate}.{name}.directions"],
                arrays[f"sensor.{gate}.{name}.centre"],
            )
            for name in entry["sites"]
        )
        sensors.append(Sensor(readings, tuple(entry["thresholds"])))
    edits = []
    for entry in head["edits"]:
        site = site_from_str(entry["site"])
        branches = tuple(
            Branch(
                b["modality"],
                arrays[f"{site}.{b['modality']}.basis"],
                arrays[f"{site}.{b['modality']}.centre"],
                b["strength"],
                arrays.get(f"{site}.{b['modality']}.gains"),
            )
            for b in entry["branches"]
        )
        edits.append(
            Edit(
                site,
                entry["kind"],
                branches,
                arrays.get(f"{site}.push"),
                entry["strength"],
                entry["fusion"],
                arrays.get(f"{site}.reference"),
                entry["gate"],
            )
        )
    spec = GuardSpec(
        ModelIdentity(**head["model"]),
        head["method"],
        head["profile"],
        tuple(sensors),
        tuple(edits),
        head["provenance"],
    )
    extra = sorted(set(arrays) - set(tensors(spec)))
    if extra:
        raise ValueError(f"tensors nobody reads: {extra}")
    if header(spec) != head:
        raise ValueError("entries nobody reads, or in another spelling")
    return spec


def require_model(spec: GuardSpec, digest: str, where: str) -> None:
    """Refuse a guard that was fitted for another model."""
    if spec.model.digest != digest:
        raise IntegrityError(
            found=f"model {digest[:16]}",
            expected=f"model {spec.model.digest[:16]}, for which the guard was fitted",
            where=where,
            remedy="fit a guard for this model with guardbake fit",
        )
