"""The manifest: one spelling, read strictly, compared honestly."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from guardbake.bundle.files import FileEntry
from guardbake.bundle.manifest import (
    CERTIFICATE,
    MANIFEST,
    EngineBuilt,
    EngineNotBuilt,
    Manifest,
    Origins,
    check_files,
    manifest_from_json,
    manifest_of,
    read_manifest,
    write_manifest,
)
from guardbake.errors import IntegrityError, MalformedError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the files that a manifest is about, and no manifest yet."""
    folder = tmp_path / "bundle"
    (folder / "engines").mkdir(parents=True)
    contents = {CERTIFICATE: "{}", "decoder.onnx": "graph", "engines/rtx.json": "{}", "b": "b"}
    for name, text in contents.items():
        (folder / name).write_text(text)
    return folder


@pytest.fixture
def manifest(folder: Path, origins: Origins) -> Manifest:
    return manifest_of(folder, replace(origins, engine=EngineBuilt(("engines/rtx.json",))))


def test_same_folder_same_bytes(folder: Path, manifest: Manifest, origins: Origins) -> None:
    write_manifest(folder, manifest)
    first = (folder / MANIFEST).read_bytes()
    again = manifest_of(
        folder, replace(manifest.origins, samples=dict(reversed(list(origins.samples.items()))))
    )
    write_manifest(folder, again)
    assert (folder / MANIFEST).read_bytes() == first
    assert read_manifest(folder) == manifest
    assert [entry.name for entry in manifest.files] == sorted(
        entry.name for entry in manifest.files
    )


def test_the_chain_is_written_out(manifest: Manifest) -> None:
    chain = json.loads(manifest.to_json())["chain"]
    assert chain["model"] == manifest.origins.model
    assert chain["guard"] == manifest.origins.guard
    assert chain["samples"] == manifest.origins.samples
    assert chain["onnx"] == {"decoder.onnx": manifest.sha256("decoder.onnx")}
    assert chain["certificate"] == manifest.sha256(CERTIFICATE)
    assert chain["engine"] == {"records": {"engines/rtx.json": manifest.sha256("engines/rtx.json")}}


def test_an_engine_that_was_not_built_says_why(folder: Path, origins: Origins) -> None:
    manifest = manifest_of(folder, replace(origins, engine=EngineNotBuilt("no extra")))
    data = manifest.to_json().encode()
    assert json.loads(data)["chain"]["engine"] == {"not_built": "no extra"}
    assert manifest_from_json(data, "here") == manifest


def _set(*path: str | int, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(document: Any) -> None:
        for step in path[:-1]:
            document = document[step]
        document[path[-1]] = value

    return change


def _drop(*path: str) -> Callable[[dict[str, Any]], None]:
    def change(document: Any) -> None:
        for step in path[:-1]:
            document = document[step]
        del document[path[-1]]

    return change


CHANGES: dict[str, Callable[[dict[str, Any]], None]] = {
    "unknown key": _set("extra", value=1),
    "unknown key in the chain": _set("chain", "extra", value="0" * 64),
    "unknown key in an entry": _set("files", 0, "mode", value=420),
    "no tools": _drop("tools"),
    "no certificate in the chain": _drop("chain", "certificate"),
    "another schema": _set("schema", value=2),
    "schema true": _set("schema", value=True),
    "schema 1.0": _set("schema", value=1.0),
    "files as an object": _set("files", value={}),
    "no files": _set("files", value=[]),
    "absolute path": _set("files", 0, "name", value="/etc/hosts"),
    "escape": _set("files", 0, "name", value="../b"),
    "number as name": _set("files", 0, "name", value=3),
    "manifest lists itself": _set("files", 0, "name", value="Manifest.json"),
    "duplicate name": _set("files", 0, "name", value="certificate.json"),
    "unsorted": lambda d: d["files"].reverse(),
    "negative size": _set("files", 0, "size", value=-1),
    "size true": _set("files", 0, "size", value=True),
    "size as text": _set("files", 0, "size", value="1"),
    "not hex": _set("files", 0, "sha256", value="x" * 64),
    "upper-case hex": _set("chain", "model", value="A" * 64),
    "short guard digest": _set("chain", "guard", value="0" * 63),
    "samples not digests": _set("chain", "samples", "fit", value="some"),
    "samples as a list": _set("chain", "samples", value=[]),
    "onnx of another graph": _set("chain", "onnx", "decoder.onnx", value="0" * 64),
    "onnx of no file": _set("chain", "onnx", "vision.onnx", value="0" * 64),
    "another certificate": _set("chain", "certificate", value="0" * 64),
    "engine without a reason": _set("chain", "engine", value={"not_built": " "}),
    "engine without records": _set("chain", "engine", value={"records": {}}),
    "engine both ways": _set("chain", "engine", value={"not_built": "x", "records": {}}),
    "engine as text": _set("chain", "engine", value="not built"),
    "engine record that is no file": _set(
        "chain", "engine", value={"records": {"engines/x.json": "0" * 64}}
    ),
    "engine record of another digest": _set(
        "chain", "engine", "records", "engines/rtx.json", value="0" * 64
    ),
    "tool version as a number": _set("tools", "numpy", value=2),
    "tool without a version": _set("tools", "numpy", value=""),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_anything_off_is_malformed(
    manifest: Manifest, change: Callable[[dict[str, Any]], None]
) -> None:
    document = json.loads(manifest.to_json())
    change(document)
    data = (json.dumps(document, sort_keys=True, indent=2) + "\n").encode()
    with pytest.raises(MalformedError) as caught:
        manifest_from_json(data, "here")
    assert caught.value.exit_code == 9


@pytest.mark.parametrize(
    "respell",
    [
        lambda text: text[:-1],
        lambda text: text.replace("  ", "    "),
        lambda text: json.dumps(json.loads(text)),
        lambda text: text.replace('"schema": 1', '"schema": 1, "schema": 1'),
        lambda text: text[: len(text) // 2],
        lambda text: "[]",
    ],
)
def test_another_spelling_is_malformed(manifest: Manifest, respell: Callable[[str], str]) -> None:
    with pytest.raises(MalformedError):
        manifest_from_json(respell(manifest.to_json()).encode(), "here")


def test_no_manifest(tmp_path: Path) -> None:
    with pytest.raises(MalformedError, match="no readable manifest"):
        read_manifest(tmp_path)
    (tmp_path / MANIFEST).symlink_to("elsewhere")
    with pytest.raises(MalformedError, match="symbolic link"):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda f: (f / "extra.bin").write_bytes(b""), r"extra file 'extra\.bin'"),
        (lambda f: (f / "b").unlink(), "no file b"),
        (lambda f: (f / "b").write_text("bb"), "b of 2 bytes; expected 1 bytes"),
        (lambda f: (f / "b").write_text("c"), "b with sha256"),
        (lambda f: (f / "b").rename(f / "engines" / "b"), "no file b"),
        (lambda f: ((f / "b").unlink(), (f / "b").symlink_to("decoder.onnx")), "b, a symbolic"),
        (lambda f: (f / "more").symlink_to("engines"), "more, a symbolic"),
    ],
)
def test_damage_is_named(
    folder: Path, manifest: Manifest, damage: Callable[[Path], object], named: str
) -> None:
    write_manifest(folder, manifest)
    assert check_files(folder, manifest, full=True) == 4
    damage(folder)
    with pytest.raises(IntegrityError, match=named) as caught:
        check_files(folder, manifest, full=False)
    assert caught.value.exit_code == 6


def test_large_files_are_read_only_when_asked(
    folder: Path, origins: Origins, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("guardbake.bundle.manifest.SMALL", 5)
    manifest = manifest_of(folder, origins)
    (folder / "decoder.onnx").write_text("GRAPH")
    assert check_files(folder, manifest, full=False) == 3
    with pytest.raises(IntegrityError, match=r"decoder\.onnx with sha256"):
        check_files(folder, manifest, full=True)


def test_a_manifest_needs_its_certificate(origins: Origins) -> None:
    with pytest.raises(MalformedError, match="no entry for certificate"):
        Manifest((FileEntry("a", 0, "0" * 64),), origins)
