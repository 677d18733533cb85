"""The bytes of an engine, handed out only if they are what a verified list says they are."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import NoReturn

from guardbake.bundle.engine_folder import ENGINES, verify_engine_folder
from guardbake.bundle.manifest import MANIFEST, EngineBuilt, read_manifest
from guardbake.bundle.verify import verify_bundle
from guardbake.errors import EnvironmentFault, IntegrityError

from guardbake_tensorrt.backend import Backend
from guardbake_tensorrt.record import EngineRecord


def load_engine(
    folder: Path, name: str, backend: Backend, bundle: Path | None = None
) -> tuple[EngineRecord, bytes]:
    """(record, content) of the engine `name`, e.g. "decoder", for `backend` to deserialise.

    folder: a bundle, or a folder that `guardbake build` wrote; it is verified first. bundle: what
    such a folder was built from, to be verified and compared too. The bytes returned are those that
    were hashed. Raises IntegrityError if the engine is not listed or is not what the list and its
    record say, EnvironmentFault if another backend or another version of it compiled the engine.
    """
    wanted = _listed(folder, f"{name}.engine", bundle)
    content = (folder / f"{name}.engine").read_bytes()
    text = (folder / f"{name}.engine.json").read_text(encoding="utf-8")
    record = EngineRecord.from_json(text)
    digest = hashlib.sha256(content).hexdigest()
    if not digest == wanted == record.engine_sha256:
        _refuse(f"{name}.engine with sha256 {digest[:16]}", f"sha256 {wanted[:16]}", folder)
    if (record.backend, record.version) != (backend.name, backend.version):
        raise EnvironmentFault(
            found=f"an engine by {record.backend} {record.version}",
            expected=f"one by {backend.name} {backend.version}: engines are of one version",
            where=str(folder / f"{name}.engine"),
            remedy="install that version, or build the engine again with this one",
        )
    return record, content


def _listed(folder: Path, engine: str, bundle: Path | None) -> str:
    """The digest that the folder's verified list states for the file `engine`."""
    if (folder / MANIFEST).is_file():
        verify_bundle(folder)
        manifest = read_manifest(folder)
        built = manifest.origins.engine
        listed = isinstance(built, EngineBuilt) and f"{engine}.json" in built.records
        digests = {entry.name: entry.sha256 for entry in manifest.files if listed}
    elif (folder / ENGINES).is_file():
        found = verify_engine_folder(folder, bundle)
        digests = {each.engine.name: each.engine.sha256 for each in found.engines}
    else:
        _refuse("no list of engines", f"a bundle, or a folder with {ENGINES}", folder)
    if engine not in digests:
        _refuse(f"{engine}, which is not listed", f"one of {', '.join(sorted(digests))}", folder)
    return digests[engine]


def _refuse(found: str, expected: str, where: Path) -> NoReturn:
    raise IntegrityError(
        found=found,
        expected=expected,
        where=str(where),
        remedy="do not load this engine: build it again with guardbake build",
    )
