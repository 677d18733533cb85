"""What is fuzzed: for each kind of input a sound file, ways to damage it, and who reads it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
from hypothesis import strategies as st

from guardbake.artifact import load_guard, safetensors_bytes
from guardbake.bundle.engine import check_engines
from guardbake.bundle.manifest import DECODER, Manifest, manifest_from_json
from guardbake.bundle.verify import Bundle, run_check
from guardbake.recipe import load_recipe
from guardbake.spec import GuardSpec, header, tensors

from tests.bakes import TINY
from tests.fuzz.damage import damaged_bytes, damaged_json, damaged_message

Damaged = st.SearchStrategy[bytes]
RECORD = "decoder.engine.json"


@dataclass(frozen=True)
class Target:
    """damaged: strategies for a file's content. read: what a user's command does with it, given
    the folder in which a sound bundle stands and the damaged file is written. file: its name there.
    """

    file: str
    damaged: Damaged
    read: Callable[[Path], object]


def targets(bundle: Path, spec: GuardSpec, manifest: Manifest) -> Mapping[str, Target]:
    """By name. bundle: a folder of the fuzzer's own with a small sound bundle."""
    graph = onnx.load(bundle / DECODER, load_external_data=False)

    def checks(*names: str) -> Callable[[Path], object]:
        def read(folder: Path) -> None:
            opened = Bundle(folder)
            opened.manifest = manifest  # digests would tell the damage at once
            for name in names:
                run_check(name, opened)

        return read

    return {
        "guard pack": Target("guard.safetensors", _packs(spec), _pack_reader),
        "manifest": Target(
            "manifest.json", _json_files(json.loads(manifest.to_json())), _manifest_reader
        ),
        "recipe": Target("recipe.toml", _recipes(), lambda f: load_recipe(f / "recipe.toml")),
        "engine record": Target(
            RECORD,
            _json_files(json.loads((bundle / RECORD).read_text())),
            lambda folder: check_engines(folder, manifest, ["a", "b"]),
        ),
        "certificate": Target(
            "certificate.json",
            _json_files(json.loads((bundle / "certificate.json").read_text())),
            checks("certificate"),
        ),
        "external data": Target(
            DECODER,
            damaged_message(graph, "StringStringEntryProto")
            | damaged_message(graph, "TensorProto"),
            checks("data", "presence"),
        ),
        "graph": Target(
            DECODER,
            damaged_message(graph) | damaged_bytes((bundle / DECODER).read_bytes()),
            checks("data", "presence"),
        ),
    }


NAMES = (
    "guard pack", "manifest", "recipe", "engine record", "certificate", "external data", "graph",
)  # fmt: skip


def _pack_reader(folder: Path) -> GuardSpec:
    return load_guard(folder / "guard.safetensors")


def _manifest_reader(folder: Path) -> Manifest:
    path = folder / "manifest.json"
    return manifest_from_json(path.read_bytes(), str(path))


def _json_files(document: Any) -> Damaged:
    text = json.dumps(document, sort_keys=True, indent=2) + "\n"
    return damaged_json(document).map(_json_bytes) | damaged_bytes(text.encode())


def _json_bytes(value: Any) -> bytes:
    """As a program would write it, which checks nothing; deep nesting is written by hand."""
    depth = 0
    while isinstance(value, list) and len(value) == 1 and depth < 300:
        value, depth = value[0], depth + 1
    return b"[" * depth + json.dumps(value).encode() + b"]" * depth


def _packs(spec: GuardSpec) -> Damaged:
    """The header in the metadata, the library's own header, and the bytes."""
    arrays = dict(tensors(spec))

    def with_header(head: Any) -> bytes:
        return safetensors_bytes(arrays, {"guardbake": json.dumps(head), "digest": spec.digest})

    sound = with_header(header(spec))
    stop = 8 + int.from_bytes(sound[:8], "little")

    def with_table(table: Any) -> bytes:
        raw = json.dumps(table).encode()
        return len(raw).to_bytes(8, "little") + raw + sound[stop:]

    return (
        damaged_json(header(spec)).map(with_header)
        | damaged_json(json.loads(sound[8:stop])).map(with_table)
        | damaged_bytes(sound)
    )


@st.composite
def _recipes(draw: st.DrawFn) -> bytes:
    """Lines of a recipe exchanged, values replaced, bytes damaged."""
    lines = TINY.read_text(encoding="utf-8").splitlines()
    strange = (
        "[" * 3000,
        "1" * 5000,
        "1e999",
        "nan",
        "{a=1}",
        '"\\u0000"',
        "1979-05-27",
        "''",
        "-1",
    )
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.integers(0, len(lines) - 1))
        key, equals, _ = lines[place].partition("=")
        if equals:
            lines[place] = f"{key}= {draw(st.sampled_from(strange))}"
        else:
            lines[place] = draw(st.sampled_from(lines))
    data = "\n".join(lines).encode()
    return draw(damaged_bytes(data)) if draw(st.booleans()) else data
