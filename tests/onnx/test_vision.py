"""Image features and embeddings against transformers, and the host's index arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from transformers.vision_utils import (
    get_vision_cu_seqlens,
    get_vision_position_ids,
    get_vision_window_index,
)

from guardbake.batch import Batch
from guardbake.errors import UsageError

from guardbake_onnx.description import VisionGeometry
from guardbake_onnx.embedding import embedding_graph
from guardbake_onnx.grid import vision_inputs
from tests.onnx.conftest import Exported, largest_difference

# fp32 on both sides; the features are below 1 and differed by 3.3e-7 on the tiny LLaVA
FEATURES = 1e-4
GRIDS = (
    [[1, 8, 8]],
    [[1, 6, 10]],
    [[1, 10, 14], [1, 8, 8]],
    [[2, 8, 12], [1, 4, 4], [1, 18, 6]],
)


def test_image_features_equal_transformers(exported: Exported, mixed_batch: Batch) -> None:
    seen = exported.runner.features(mixed_batch)
    assert seen is not None
    assert mixed_batch.pixel_values is not None
    model: Any = exported.vlm.model
    pixels = torch.from_numpy(mixed_batch.pixel_values)
    grid = mixed_batch.image_grid_thw
    extra = () if grid is None else (torch.from_numpy(grid),)
    with torch.no_grad():
        expected = torch.cat(list(model.model.get_image_features(pixels, *extra).pooler_output))
    assert seen.shape == tuple(expected.shape)
    assert largest_difference(seen, expected.numpy()) <= FEATURES


@pytest.mark.parametrize("grids", GRIDS)
def test_any_grid_goes_through_the_vision_graph(exported: Exported, grids: Any) -> None:
    if exported.vlm.family.vision_kind != "qwen2_5_vl":
        size, patch = 1 + len(grids), exported.runner.description.vision.image_size
        pixels = np.random.default_rng(1).normal(size=(size, 3, patch, patch)).astype(np.float32)
        grid = None
    else:
        vision: Any = exported.vlm.model.config.vision_config
        width = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        grid = np.array(grids)
        count = int(grid.prod(axis=1).sum())
        pixels = np.random.default_rng(1).normal(size=(count, width)).astype(np.float32)
    nothing = np.zeros((1, 1), np.int64)
    seen = exported.runner.features(Batch(nothing, nothing, nothing == 1, pixels, grid))
    model: Any = exported.vlm.model
    extra = () if grid is None else (torch.from_numpy(grid),)
    with torch.no_grad():
        out = model.model.get_image_features(torch.from_numpy(pixels), *extra).pooler_output
    assert seen is not None
    assert largest_difference(seen, torch.cat(list(out)).numpy()) <= FEATURES


@pytest.mark.parametrize("grids", GRIDS)
@pytest.mark.parametrize(("patch", "window"), [(14, 112), (14, 56), (24, 96)])
def test_index_arrays_equal_transformers(grids: Any, patch: int, window: int) -> None:
    geometry = VisionGeometry("qwen2_5_vl", patch, 2, window, 0)
    grid = np.array(grids)
    pixels = np.zeros((int(grid.prod(axis=1).sum()), 3), np.float32)
    seen = vision_inputs(geometry, pixels, grid)
    tensor = torch.from_numpy(grid)
    index, ends = get_vision_window_index(tensor, 2, window, patch)
    assert seen["window_index"].tolist() == index.tolist()
    assert seen["cu_window_seqlens"].tolist() == ends.tolist()
    assert seen["cu_seqlens"].tolist() == get_vision_cu_seqlens(tensor).tolist()
    assert (seen["position_ids"] == get_vision_position_ids(tensor, 2).numpy()).all()


def test_grids_that_do_not_add_up_are_refused() -> None:
    geometry = VisionGeometry("qwen2_5_vl", 14, 2, 112, 0)
    with pytest.raises(UsageError, match="8 patches"):
        vision_inputs(geometry, np.zeros((8, 3), np.float32), np.array([[1, 4, 4]]))
    with pytest.raises(UsageError, match="absent"):
        vision_inputs(geometry, np.zeros((8, 3), np.float32), None)


@pytest.mark.parametrize("image_token", [3, 70])
def test_features_replace_image_tokens_in_order(image_token: int, tmp_path: Any) -> None:
    """Also for an image token outside the table, and for none at all."""
    table = np.arange(40, dtype=np.float32).reshape(20, 2)
    ir.save(embedding_graph(ir.tensor(table), image_token), tmp_path / "e.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "e.onnx", providers=["CPUExecutionProvider"])
    ids = np.array([[1, image_token, image_token], [image_token, 5, 6]])
    features = np.array([[-1, -2], [-3, -4], [-5, -6]], np.float32)
    (out,) = session.run(None, {"input_ids": ids, "image_features": features})
    assert out.tolist() == [[[2, 3], [-1, -2], [-3, -4]], [[-5, -6], [10, 11], [12, 13]]]
    text = {"input_ids": ids[1:, 1:], "image_features": features[:0]}
    assert session.run(None, text)[0].tolist() == [[[10, 11], [12, 13]]]
