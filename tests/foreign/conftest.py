"""The folders that other exporters wrote (see tools/make_foreign), and guards that fit them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from guardbake.site import Site
from guardbake.spec import GuardSpec

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
