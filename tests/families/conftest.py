"""Every family's tiny checkpoint, loaded and exported once, and what it is asked."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from guardbake.batch import Batch
from guardbake.vlm.files import hash_files
from guardbake.vlm.load import load_vlm
from guardbake.vlm.requests import collated
from guardbake.vlm.tokens import Request

from guardbake_onnx import OnnxExporter
from guardbake_onnx.runner import OnnxRunner
from tests.families.checkpoints import MAKERS, make_checkpoint
from tests.onnx.conftest import Exported


@pytest.fixture(scope="session", params=sorted(MAKERS))
def member(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """One family, exported."""
    torch.set_num_threads(1)
    checkpoint = tmp_path_factory.mktemp(request.param)
    captured, target = tmp_path_factory.mktemp("captured"), tmp_path_factory.mktemp("onnx")
    make_checkpoint(request.param, checkpoint)
    vlm = load_vlm(str(checkpoint))
    assert vlm.family.name == request.param
    OnnxExporter().capture(vlm.folder, "float32", captured)
    OnnxExporter().export(hash_files(vlm.folder), captured, "stream", target)
    return Exported(vlm, captured, target, OnnxRunner(target, threads=1))


@pytest.fixture(scope="session")
def asked(member: Exported) -> list[Request]:
    """A wide picture, text alone if that can be asked, a tall picture: three lengths."""
    beside = None if member.vlm.family.imageless else noise(33, 33)
    return [("how to paint a wall", noise(60, 100)), ("open", beside), ("how to", noise(90, 40))]


@pytest.fixture(scope="session")
def mixed(member: Exported, asked: list[Request]) -> Batch:
    """All three, left-padded."""
    batch = collated(member.vlm, asked)
    assert len(set(batch.prompt_lengths.tolist())) == 3
    assert (batch.image_mask.sum(axis=1) > 0).tolist() == [
        True,
        not member.vlm.family.imageless,
        True,
    ]
    return batch


def noise(height: int, width: int) -> Image.Image:
    """A picture of random pixels, the same for the same size."""
    pixels = np.random.default_rng(height * 1000 + width).integers(0, 256, (height, width, 3))
    return Image.fromarray(pixels.astype(np.uint8))
