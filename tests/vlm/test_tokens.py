"""Batches and position ids, against transformers' own."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from guardbake.errors import UnsupportedError, UsageError
from guardbake.vlm.catalog import models_root
from guardbake.vlm.load import Vlm, load_vlm
from guardbake.vlm.tokens import collate, next_positions, positions


@pytest.fixture(scope="module")
def qwen() -> Vlm:
    return load_vlm(str(models_root() / "tiny-qwen2_5_vl"))


@pytest.fixture(scope="module")
def llava() -> Vlm:
    return load_vlm(str(models_root() / "tiny-llava"))


def row(vlm: Vlm, grids: list[list[int]], before: int, after: int) -> list[int]:
    """Token ids with one run of image tokens for each grid, text around and between them."""
    ids = [9] * before
    for t, h, w in grids:
        ids += [vlm.image_token_id] * (t * h * w // 4) + [10]
    return ids + [11] * after


@pytest.mark.parametrize(
    "rows",
    [
        [[]],
        [[[1, 8, 8]]],
        [[[1, 4, 12]], []],
        [[[1, 6, 4], [1, 8, 8]], [[1, 4, 4]], []],
        [[], [[2, 4, 6], [1, 10, 4], [1, 4, 4]]],
    ],
)
def test_mrope_equals_get_rope_index(qwen: Vlm, rows: list[list[list[int]]]) -> None:
    tokens = [row(qwen, grids, 2 + n, 5 - n) for n, grids in enumerate(rows)]
    length = max(map(len, tokens))
    mask = np.array([[0] * (length - len(ids)) + [1] * len(ids) for ids in tokens])
    ids = np.array([[0] * (length - len(ids)) + ids for ids in tokens])
    grids = [grid for some in rows for grid in some]
    grid = np.array(grids) if grids else None
    images = ids == qwen.image_token_id
    model: Any = qwen.model.model
    expected, delta = model.get_rope_index(
        torch.from_numpy(ids),
        torch.from_numpy(images.astype(np.int64)),
        None if grid is None else torch.from_numpy(grid),
        attention_mask=torch.from_numpy(mask),
    )
    seen = positions("mrope", mask, image_mask=images, image_grid_thw=grid, merge=2)
    assert seen.dtype == np.int64
    assert (seen == expected.numpy()).all()
    after = mask.sum(axis=1) + delta.numpy()[:, 0] + 2
    assert (next_positions(seen, 2)[:, :, 0] == after).all()


def test_sequential_positions_count_real_tokens() -> None:
    mask = np.array([[0, 0, 1, 1], [1, 1, 1, 1]])
    seen = positions("sequential", mask)
    assert seen.tolist() == [[0, 0, 0, 1], [0, 1, 2, 3]]
    assert next_positions(seen, 0).tolist() == [[2], [4]]
    assert next_positions(seen, 3).tolist() == [[5], [7]]


def test_images_side_by_side_each_use_their_own_grid() -> None:
    grid = np.array([[1, 4, 4], [1, 4, 4]])
    images = np.array([[True] * 8])
    seen = positions("mrope", np.ones((1, 8)), image_mask=images, image_grid_thw=grid, merge=2)
    assert seen[:, 0].T.tolist()[:4] == [[0, 0, 0], [0, 0, 1], [0, 1, 0], [0, 1, 1]]
    assert (seen[:, 0, 4:] == seen[:, 0, :4] + 2).all()


@pytest.mark.parametrize("grids", [[[1, 8, 8]], [[1, 4, 4], [1, 4, 4]], []])
def test_grids_that_do_not_fit_the_tokens_are_refused(grids: list[list[int]]) -> None:
    images = np.array([[False, True, True, True, True, False]])
    grid = np.array(grids).reshape(-1, 3).astype(np.int64)
    with pytest.raises(UnsupportedError, match="position ids"):
        positions("mrope", np.ones((1, 6)), image_mask=images, image_grid_thw=grid, merge=2)


def test_a_batch_holds_each_request_as_if_alone(llava: Vlm) -> None:
    requests = [("how to", Image.new("RGB", (50, 30), "red")), ("open", None), ("how to", None)]
    batch = collate(llava.processor, llava.image_token_id, requests)
    assert batch.pixel_values is not None
    assert batch.pixel_values.dtype == np.float32
    assert len(batch.pixel_values) == 1
    assert batch.image_grid_thw is None
    assert batch.image_mask.sum(axis=1).tolist() == [16, 0, 0]
    for n, request in enumerate(requests):
        alone = collate(llava.processor, llava.image_token_id, [request])
        real = batch.attention_mask[n] == 1
        assert batch.input_ids[n][real].tolist() == alone.input_ids[0].tolist()
        assert real.tolist() == sorted(real.tolist())
        assert batch.prompt_lengths[n] == alone.input_ids.shape[1]


def test_the_prompt_is_what_the_chat_template_says(llava: Vlm) -> None:
    batch = collate(llava.processor, llava.image_token_id, [("how to", None)])
    conversation = [{"role": "user", "content": [{"type": "text", "text": "how to"}]}]
    text = llava.processor.apply_chat_template(
        conversation, add_generation_prompt=True, tokenize=False
    )
    expected = llava.processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert batch.input_ids[0].tolist() == expected


def test_nothing_to_collate_is_refused(llava: Vlm) -> None:
    with pytest.raises(UsageError, match="no request"):
        collate(llava.processor, llava.image_token_id, [])
