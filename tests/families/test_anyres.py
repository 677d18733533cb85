"""Images laid out of their tiles, against transformers' own packing."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers.models.llava_next.modeling_llava_next import LlavaNextModel
from transformers.models.llava_onevision.modeling_llava_onevision import LlavaOnevisionModel

from guardbake.errors import UsageError

from guardbake_onnx.anyres import packed_features
from guardbake_onnx.description import VisionGeometry

SIDE, PATCH, WIDTH = 32, 8, 5  # px, px, numbers a feature
PER_TILE = (SIDE // PATCH) ** 2
LAYOUTS = ((32, 64), (64, 32), (64, 64), (96, 32), (32, 96), (96, 96))
SIZES = [(60, 100), (100, 60), (33, 33), (7, 200), (96, 95), (64, 64)]


def tiles_of(size: tuple[int, int]) -> int:
    """How many tiles the layout of an image has, with the one of the whole."""
    for count in range(2, 11):
        tiling = np.array([[count, *size]])
        try:
            packed_features(VisionGeometry("anyres", PATCH, 1, 0, SIDE, LAYOUTS), count, tiling)
        except UsageError:
            continue
        return count
    raise AssertionError("no layout fits")


@pytest.mark.parametrize("limit", [0, 1, 2, 4, 9])
def test_packing_equals_transformers(limit: int) -> None:
    """All sizes in one batch; a limit of 1 resamples every layout of more than one tile."""
    geometry = VisionGeometry("anyres", PATCH, 1, 0, SIDE, LAYOUTS, limit)
    counts = [tiles_of(size) for size in SIZES]
    features = torch.randn(
        sum(counts), PER_TILE, WIDTH, generator=torch.Generator().manual_seed(limit)
    )
    newline = torch.full((WIDTH,), 7.0)
    config = SimpleNamespace(
        vision_config=SimpleNamespace(image_size=SIDE, patch_size=PATCH),
        image_grid_pinpoints=[list(layout) for layout in LAYOUTS],
    )
    owner: Any = SimpleNamespace(config=config)
    parts, sizes = list(features.split(counts)), torch.tensor(SIZES)
    if limit:
        packed, _ = LlavaOnevisionModel.pack_image_features(
            owner, parts, sizes, newline, f"anyres_max_{limit}"
        )
    else:
        packed, _ = LlavaNextModel.pack_image_features(owner, parts, sizes, "full", newline)
    tiling = np.array([[count, *size] for count, size in zip(counts, SIZES, strict=True)])
    seen = packed_features(geometry, sum(counts), tiling)
    rows = torch.cat([newline[None], features.flatten(0, 1)]).numpy()[seen["feature_index"]]
    if limit:
        rows = (rows * seen["feature_weight"][..., None]).sum(axis=1)
    expected = torch.cat(list(packed)).numpy()
    assert rows.shape == expected.shape
    assert np.abs(rows - expected).max() <= (1e-5 if limit else 0)  # float32 weights, values to 7
    assert np.array_equal((rows == 7).all(axis=1), (expected == 7).all(axis=1))  # newlines


@pytest.mark.parametrize("tiling", [None, [[4, 60, 100]], [[3, 60, 100], [2, 33, 33]]])
def test_tilings_that_do_not_add_up_are_refused(tiling: Any) -> None:
    geometry = VisionGeometry("anyres", PATCH, 1, 0, SIDE, LAYOUTS)
    with pytest.raises(UsageError, match="5 tiles"):
        packed_features(geometry, 5, None if tiling is None else np.array(tiling))
