"""The folders that other exporters wrote (see tools/make_foreign), and guards that fit them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from guardbake.artifact import save_guard
from guardbake.site import Site
from guardbake.spec import GuardSpec
from guardbake.vlm.load import Vlm

FOLDERS = Path(__file__).parent / "folders"
WIDTH, LAYERS = 16, 2
GRAPHS = {
    "genai-fp32": "model.onnx",
    "genai-fp16": "model.onnx",
    "genai-int8": "model.onnx",
    "genai-int4": "model.onnx",
    "mobius": "model.onnx",
    "mobius-gqa": "model.onnx",
    "optimum": "model.onnx",
    "optimum-merged": "onnx/decoder_model_merged.onnx",
    "onnxruntime-saved": "model.onnx",
    "edgellm": "llm/model.onnx",
}


@pytest.fixture(scope="session")
def graph_of() -> Callable[[str], Path]:
    """`graph_of("optimum")` is the decoder's graph in that folder."""
    return lambda name: FOLDERS / name / GRAPHS[name]


@pytest.fixture(scope="session")
def foreign_guard(guard: Callable[..., GuardSpec]) -> Callable[..., GuardSpec]:
    """`small_guard` for the decoder of these folders: reads layer 0, edits layer 1."""

    def make(profile: str = "token", kind: str = "care", **changes: object) -> GuardSpec:
        shape = {"width": WIDTH, "layers": LAYERS, "sensor": Site(0, "residual"), "edits": (1,)}
        return guard(profile, kind, **(shape | changes))

    return make


@pytest.fixture
def guard_folder(
    run: Callable[..., int], guard: Callable[..., GuardSpec], tmp_path: Path
) -> Callable[..., tuple[GuardSpec, Path]]:
    """`guard_folder(vlm, source, "sequence", threshold=..., ...)`: a guard that pushes, made for
    this model, and the folder that it was applied to."""

    def make(vlm: Vlm, source: Path, profile: str, **changes: object) -> tuple[GuardSpec, Path]:
        made = guard(profile, "steer", family=vlm.family.name, seed=3, **changes)
        spec = replace(made, model=replace(made.model, digest=vlm.model_digest))
        told = [profile, changes.get("pools"), changes.get("threshold"), source.name]
        pack, out = tmp_path / "guard.safetensors", tmp_path / " ".join(map(str, told))
        save_guard(spec, pack)
        assert run("apply", source, "--guard", pack, "-o", out) == 0
        assert run("verify", out, "--unguarded", source) == 0
        return spec, out

    return make
