"""The papers follow from the bundle, name every part of it once, and say nothing of the machine."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from guardbake.bundle.files import describe
from guardbake.bundle.manifest import MANIFEST, Manifest, Origins
from guardbake.bundle.papers import PROVENANCE, SBOM, check_papers, seal
from guardbake.errors import IntegrityError


@pytest.fixture
def folder(sources: dict[str, Path]) -> Path:
    """The files of a bundle, papers not yet written."""
    return next(iter(sources.values())).parent


@pytest.fixture
def manifest(folder: Path, origins: Origins) -> Manifest:
    return seal(folder, origins)


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def test_the_same_bundle_elsewhere_has_the_same_papers(
    folder: Path, manifest: Manifest, origins: Origins, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "elsewhere"))
    assert seal(copy, origins).to_json() == manifest.to_json()
    for name in (SBOM, PROVENANCE):
        assert (copy / name).read_bytes() == (folder / name).read_bytes()
        assert str(tmp_path) not in (copy / name).read_text()
    assert seal(folder, origins) == manifest  # sealed again


def test_the_bill_names_every_file_and_origin(
    folder: Path, manifest: Manifest, origins: Origins
) -> None:
    bill = read(folder / SBOM)
    assert (bill["bomFormat"], bill["specVersion"], bill["version"]) == ("CycloneDX", "1.6", 1)
    parts = {part["bom-ref"]: part for part in bill["components"]}
    assert len(parts) == len(bill["components"])
    for entry in manifest.files:
        if entry.name not in (SBOM, PROVENANCE):
            (hashed,) = parts[f"file/{entry.name}"]["hashes"]
            assert hashed == {"alg": "SHA-256", "content": entry.sha256}
    assert parts["model"]["properties"] == [{"name": "guardbake:model", "value": origins.model}]
    assert {"samples/fit", "samples/test", "guard"} <= set(parts)
    named = {ref for line in bill["dependencies"] for ref in (line["ref"], *line["dependsOn"])}
    assert named <= {*parts, bill["metadata"]["component"]["bom-ref"]}


def test_the_provenance_is_of_every_file_and_from_every_origin(
    folder: Path, manifest: Manifest, origins: Origins
) -> None:
    statement = read(folder / PROVENANCE)
    assert statement["_type"] == "https://in-toto.io/Statement/v1"
    assert statement["predicateType"] == "https://slsa.dev/provenance/v1"
    subjects = {each["name"]: each["digest"]["sha256"] for each in statement["subject"]}
    listed = {entry.name: entry.sha256 for entry in manifest.files}
    assert subjects == {n: d for n, d in listed.items() if n not in (SBOM, PROVENANCE)}
    definition = statement["predicate"]["buildDefinition"]
    assert definition["externalParameters"] == {"recipe": read(folder / "recipe.json")}
    names = [each["name"] for each in definition["resolvedDependencies"]]
    assert names == ["model", "samples/fit", "samples/test", *sorted(origins.tools)]


@pytest.mark.parametrize("name", [SBOM, PROVENANCE])
@pytest.mark.parametrize("content", [b"{}", None], ids=["other", "gone"])
def test_other_papers_are_refused(
    folder: Path, manifest: Manifest, name: str, content: bytes | None
) -> None:
    check_papers(folder, manifest)
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_bytes(content)
    with pytest.raises(IntegrityError, match=name.replace(".", r"\.")) as caught:
        check_papers(folder, manifest)
    assert caught.value.exit_code == 6


def test_papers_of_another_file_are_refused(folder: Path, origins: Origins) -> None:
    manifest = seal(folder, origins)
    (folder / "recipe.json").write_text('{"name": "other"}')
    entries = tuple(
        entry if entry.name != "recipe.json" else describe(folder, "recipe.json")
        for entry in manifest.files
    )
    with pytest.raises(IntegrityError, match=r"sbom\.cdx\.json"):
        check_papers(folder, Manifest(entries, origins))
    assert MANIFEST not in {entry.name for entry in entries}
