"""Engines are loaded from a list that was verified, byte for byte, and from nothing else."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from guardbake.bundle.files import describe
from guardbake.bundle.manifest import GUARD, EngineBuilt, read_manifest, write_manifest
from guardbake.bundle.papers import seal
from guardbake.errors import EnvironmentFault, IntegrityError

from guardbake_tensorrt import Backend, load_engine
from tests.tensorrt.bundles import Built, change_decoder


@pytest.fixture
def engines(built: Built, tmp_path: Path) -> Path:
    """A copy of the engines, to be altered."""
    return Path(shutil.copytree(built.folder, tmp_path / "engines"))


def test_an_engine_is_loaded_as_it_was_listed(
    engines: Path, bundle: Path, backend: Backend
) -> None:
    record, content = load_engine(engines, "decoder", backend, bundle)
    assert len(content) == record.engine_bytes
    assert load_engine(engines, "vision", backend)[0].guard_digest is None


def _other_bytes(folder: Path) -> None:
    content = (folder / "decoder.engine").read_bytes()
    (folder / "decoder.engine").write_bytes(content[:-1] + b"?")


def _other_record(folder: Path) -> None:
    path = folder / "decoder.engine.json"
    path.write_text(
        path.read_text().replace('"STRICT_NANS",\n      "True"', '"STRICT_NANS",\n      "False"')
    )


def _no_list(folder: Path) -> None:
    (folder / "engines.json").unlink()


def _unlisted(folder: Path) -> None:
    for suffix in (".engine", ".engine.json"):
        shutil.copyfile(folder / f"decoder{suffix}", folder / f"vision2{suffix}")


def _listed_anew(folder: Path) -> None:
    """The list agrees with the bytes; the record of the engine does not."""
    _other_bytes(folder)
    path, old = folder / "engines.json", json.loads((folder / "engines.json").read_text())
    for entry in old["files"]:
        entry["sha256"] = describe(folder, entry["name"]).sha256
    path.write_text(json.dumps(old, indent=2, sort_keys=True) + "\n")


@pytest.mark.parametrize(
    "plant",
    [_other_bytes, _other_record, _no_list, _unlisted, _listed_anew],
    ids=lambda p: p.__name__,
)
def test_an_engine_that_is_not_what_is_listed_is_not_loaded(
    engines: Path, backend: Backend, plant: Callable[[Path], None]
) -> None:
    plant(engines)
    with pytest.raises(IntegrityError):
        load_engine(engines, "decoder", backend)


def test_an_engine_of_another_bundle_or_version_is_not_loaded(
    engines: Path, altered: Path, guarded: Any, backend: Backend
) -> None:
    with pytest.raises(IntegrityError, match="not listed"):
        load_engine(engines, "encoder", backend)
    older = Backend("rtx", backend.module, "1.6", backend.logger, backend.log)
    with pytest.raises(EnvironmentFault, match="of one version"):
        load_engine(engines, "decoder", older)
    change_decoder(altered, guarded.spec, lambda model: model.metadata_props.update(more="1"))
    with pytest.raises(IntegrityError, match=r"another decoder\.onnx"):
        load_engine(engines, "decoder", backend, altered)
    (altered / GUARD).unlink()
    with pytest.raises(IntegrityError):
        load_engine(engines, "decoder", backend, altered)


def test_an_engine_in_a_bundle_is_loaded_if_its_record_is_of_the_chain(
    altered: Path, built: Built, backend: Backend
) -> None:
    for name in ("decoder.engine", "decoder.engine.json"):
        shutil.copyfile(built.folder / name, altered / name)
    origins = read_manifest(altered).origins
    write_manifest(altered, seal(altered, origins))
    with pytest.raises(IntegrityError, match="not listed"):
        load_engine(altered, "decoder", backend)
    recorded = replace(origins, engine=EngineBuilt(("decoder.engine.json",)))
    write_manifest(altered, seal(altered, recorded))
    assert load_engine(altered, "decoder", backend)[1]
    (altered / "decoder.engine").write_bytes(b"another")
    write_manifest(altered, seal(altered, recorded))
    with pytest.raises(IntegrityError, match="record of engine"):
        load_engine(altered, "decoder", backend)
