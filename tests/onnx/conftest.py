"""The tiny checkpoints, loaded and exported once for all tests of the exporter."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image

from guardbake.batch import Batch
from guardbake.vlm.catalog import models_root
from guardbake.vlm.files import hash_files
from guardbake.vlm.load import Vlm, load_vlm
from guardbake.vlm.tokens import collate

from guardbake_onnx import OnnxExporter
from guardbake_onnx.runner import OnnxRunner


@dataclass(frozen=True)
class Exported:
    """One family: the torch model, the captured graphs, the folder exported, and its runner."""

    vlm: Vlm
    captured: Path
    folder: Path
    runner: OnnxRunner


@pytest.fixture(scope="session", params=["tiny-llava", "tiny-qwen2_5_vl"])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    torch.set_num_threads(1)
    vlm = load_vlm(str(models_root() / request.param))
    captured, target = tmp_path_factory.mktemp("captured"), tmp_path_factory.mktemp("onnx")
    OnnxExporter().capture(vlm.folder, "float32", captured)
    files = hash_files(vlm.folder)
    OnnxExporter().export(files, captured, "stream", target)
    return Exported(vlm, captured, target, OnnxRunner(target))


@pytest.fixture(scope="session")
def mixed_batch(exported: Exported) -> Batch:
    """A picture, text alone, a blank image: three lengths, left-padded, two with an image."""
    noise = np.random.default_rng(7).integers(0, 255, (192, 192, 3), dtype=np.uint8)
    requests = [
        ("how to paint a wall", Image.fromarray(noise)),
        ("open", None),
        ("how to", Image.new("RGB", (192, 192), "white")),
    ]
    return collate(exported.vlm.processor, exported.vlm.image_token_id, requests)


def largest_difference(a: npt.NDArray[np.float32], b: npt.NDArray[np.float32]) -> float:
    """max |a - b|; infinite where either is not a number, so that NaN never passes."""
    difference = np.abs(a.astype(np.float64) - b.astype(np.float64))
    return float(np.where(np.isfinite(difference), difference, np.inf).max())
