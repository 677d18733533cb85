"""The differentiable path to pixel_values against the processors themselves."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from guardbake.errors import UnsupportedError
from guardbake.vlm.catalog import models_root
from guardbake.vlm.load import Vlm, load_vlm
from guardbake.vlm.pixels import as_seen, pixel_path
from guardbake.vlm.tokens import collate

SIDE = 192


@pytest.fixture(scope="module", params=["tiny-llava", "tiny-qwen2_5_vl"])
def vlm(request: pytest.FixtureRequest) -> Vlm:
    return load_vlm(str(models_root() / request.param))


def noise(count: int, height: int = SIDE, width: int = SIDE) -> np.ndarray:
    return np.random.default_rng(7).integers(0, 256, (count, height, width, 3), np.uint8)


def processed(vlm: Vlm, images: np.ndarray) -> np.ndarray:
    requests = [("", Image.fromarray(image)) for image in images]
    values = collate(vlm.processor, vlm.image_token_id, requests).pixel_values
    assert values is not None
    return values


def test_values_are_the_processor_s(vlm: Vlm) -> None:
    images = noise(2)
    values = pixel_path(vlm, SIDE, SIDE).values(torch.from_numpy(images) / 255)
    expected = processed(vlm, images)
    assert values.shape == expected.shape
    assert np.abs(values.numpy() - expected).max() < 1e-6  # of numbers up to 1


def test_every_pixel_has_a_gradient(vlm: Vlm) -> None:
    images = (torch.from_numpy(noise(1)) / 255).requires_grad_()
    pixel_path(vlm, SIDE, SIDE).values(images).sum().backward()
    assert images.grad is not None
    assert (images.grad > 0).all()


def test_an_image_is_seen_as_the_processor_resizes_it(vlm: Vlm) -> None:
    wide = Image.fromarray(noise(1, 130, 100)[0])
    (seen,) = as_seen(vlm, [wide])
    again = processed(vlm, seen[None])
    shown = processed(vlm, np.asarray(wide)[None])
    assert again.shape == shown.shape
    assert np.abs(again - shown).max() <= 1.01 / 255  # half a level; they span [-1, 1]
    assert (as_seen(vlm, [Image.fromarray(seen)])[0] == seen).all()


def test_a_size_that_is_resized_is_refused(vlm: Vlm) -> None:
    with pytest.raises(UnsupportedError, match="mixes pixels"):
        pixel_path(vlm, 100, 130)
