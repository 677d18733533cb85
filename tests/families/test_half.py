"""Families whose norms compute in float32 beside a stream of float16: they run, and have sites."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from guardbake.bundle.graphs import load_graph
from guardbake.passes.locate import locate
from guardbake.site import Site
from guardbake.vlm.files import hash_files
from guardbake.vlm.load import load_vlm
from guardbake.vlm.requests import collated
from guardbake.vlm.runner import TorchRunner

from guardbake_onnx import OnnxExporter
from guardbake_onnx.runner import OnnxRunner
from tests.families.checkpoints import make_checkpoint
from tests.families.conftest import noise

# float16 keeps 2^-11 of a value; five layers of a model of random numbers, seen 0.002
HALF = 0.01


@pytest.mark.parametrize("family", ["gemma3", "paligemma"])
def test_a_float16_graph_says_what_float32_does(family: str, tmp_path: Path) -> None:
    checkpoint, captured, out = (tmp_path / name for name in ("checkpoint", "captured", "out"))
    make_checkpoint(family, checkpoint)
    vlm = load_vlm(str(checkpoint))
    for folder in (captured, out):
        folder.mkdir()
    OnnxExporter().capture(vlm.folder, "float16", captured)
    OnnxExporter().export(hash_files(vlm.folder), captured, "stream", out)
    asked = [("how to paint a wall", noise(60, 100)), ("how to", noise(90, 40))]
    batch = collated(vlm, asked)
    wanted = TorchRunner(vlm, None).run(batch, 3)
    got = OnnxRunner(out, threads=1).run(batch, 3, forced_tokens=wanted.tokens)
    largest = np.abs(wanted.step_logits).max()
    assert np.abs(got.step_logits - wanted.step_logits).max() < HALF * largest
    sites = [Site(layer, "ffn_output") for layer in range(5)]
    found = locate(load_graph(out / "decoder.onnx").graph, sites)
    assert all(found[site].confirmed for site in sites)
