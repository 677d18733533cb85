"""The index arrays that a vision graph needs for its images, in numpy.

The order of windows and the ends of segments depend on the grid in ways a graph cannot say with
static operators, so the host computes them: section 2.1 of arXiv 2502.13923, and transformers'
vision_utils, which the tests compare with.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from guardbake.errors import UsageError

from guardbake_onnx.anyres import packed_features
from guardbake_onnx.description import VisionGeometry

Array = npt.NDArray[Any]


def vision_inputs(
    geometry: VisionGeometry,
    pixel_values: Array,
    image_grid_thw: Array | None = None,
    image_tiling: Array | None = None,
    instruction_ids: Array | None = None,
) -> dict[str, Array]:
    """The feeds of vision.onnx.

    Towers of tiles: pixel_values [tiles, 3, h, w], and for anyres what `packed_features` says of
    image_tiling; behind a Q-Former instruction_ids [tiles, longest], -1 beyond the end, as
    qformer_input_ids and qformer_attention_mask int64. Towers of patches: pixel_values [patches,
    3 * t * p * p] and, from image_grid_thw [images, 3] in patches: position_ids [patches, 2] and
    cu_seqlens [segments + 1], for qwen2_5_vl window_index [tokens] and cu_window_seqlens
    [windows + 1] as well, all int64, for qwen3_vl interp_indices [patches, 4] and interp_weights
    [patches, 4] float32. Raises UsageError if the grids do not add up to the patches, or the
    tilings to the tiles.
    """
    if geometry.kind == "anyres":
        return {"pixel_values": pixel_values} | packed_features(
            geometry, len(pixel_values), image_tiling
        )
    if instruction_ids is not None:
        read = (instruction_ids >= 0).astype(np.int64)
        words = {"qformer_input_ids": instruction_ids * read, "qformer_attention_mask": read}
        return {"pixel_values": pixel_values} | words
    if geometry.image_size:
        return {"pixel_values": pixel_values}
    return _patch_inputs(geometry, pixel_values, image_grid_thw)


def _patch_inputs(
    geometry: VisionGeometry, pixel_values: Array, image_grid_thw: Array | None
) -> dict[str, Array]:
    if image_grid_thw is None or int(image_grid_thw.prod(axis=1).sum()) != len(pixel_values):
        raise UsageError(
            found=f"{len(pixel_values)} patches and image_grid_thw "
            + ("absent" if image_grid_thw is None else str(image_grid_thw.tolist())),
            expected="grids that add up to the patches",
            where="the vision inputs",
            remedy="pass both as the processor returned them",
        )
    grids = [(int(t), int(h), int(w)) for t, h, w in image_grid_thw]
    frames = np.concatenate([np.full(t, h * w) for t, h, w in grids])
    feeds = {
        "pixel_values": pixel_values,
        "position_ids": np.concatenate([_patch_positions(g, geometry.merge) for g in grids]),
        "cu_seqlens": np.concatenate([[0], np.cumsum(frames)]).astype(np.int64),
    }
    if geometry.window:
        feeds["window_index"], feeds["cu_window_seqlens"] = _windows(grids, geometry)
    if geometry.position_side:
        parts = [_table_places(grid, geometry) for grid in grids]
        feeds["interp_indices"] = np.concatenate([index for index, _ in parts])
        feeds["interp_weights"] = np.concatenate([weight for _, weight in parts])
    return feeds


def _patch_positions(grid: tuple[int, int, int], merge: int) -> Array:
    """(row, column) of every patch, [t * h * w, 2], merge block by merge block."""
    t, h, w = grid
    rows_columns = np.indices((h, w)).reshape(2, h // merge, merge, w // merge, merge)
    blocked = rows_columns.transpose(1, 3, 2, 4, 0).reshape(-1, 2)
    return np.tile(blocked, (t, 1)).astype(np.int64)


def _table_places(grid: tuple[int, int, int], geometry: VisionGeometry) -> tuple[Array, Array]:
    """Of every patch the four places of the table of positions around it, and their weights.

    Bilinear, corner to corner (Qwen3-VL, arXiv 2511.21631).
    """
    _, h, w = grid
    side, taps = geometry.position_side, []
    for size, numbers in zip((h, w), _patch_positions(grid, geometry.merge).T, strict=True):
        place = numbers.astype(np.float32) * np.float32(side - 1) / np.float32(max(size - 1, 1))
        low = np.floor(place).astype(np.int64)
        share = (place - low).astype(np.float32)
        pair = np.stack([low, np.minimum(low + 1, side - 1)], axis=1)
        taps.append((pair, np.stack([1 - share, share], axis=1)))
    (rows, row_weights), (columns, column_weights) = taps
    index = (rows[:, :, None] * side + columns[:, None, :]).reshape(-1, 4)
    return index, (row_weights[:, :, None] * column_weights[:, None, :]).reshape(-1, 4)


def _windows(grids: list[tuple[int, int, int]], geometry: VisionGeometry) -> tuple[Array, Array]:
    """Tokens in window order [tokens], and the ends of the windows counted in patches."""
    side = geometry.window // geometry.merge // geometry.patch_size
    order: list[Array] = []
    lengths: list[int] = [0]
    first = 0
    for t, h, w in grids:
        rows, columns = h // geometry.merge, w // geometry.merge
        tokens = np.arange(t * rows * columns).reshape(t, rows, columns) + first
        for frame in tokens:
            for top in range(0, rows, side):
                for left in range(0, columns, side):
                    window = frame[top : top + side, left : left + side].reshape(-1)
                    order.append(window)
                    lengths.append(len(window) * geometry.merge**2)
        first += tokens.size
    return np.concatenate(order).astype(np.int64), np.cumsum(lengths).astype(np.int64)
