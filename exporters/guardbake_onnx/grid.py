"""The index arrays a Qwen2.5-VL vision graph needs for its grid, in numpy.

The order of windows and the ends of segments depend on the grid in ways a graph cannot say with
static operators, so the host computes them: section 2.1 of arXiv 2502.13923, and transformers'
vision_utils, which the tests compare with.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from guardbake.errors import UsageError

from guardbake_onnx.description import VisionGeometry

Array = npt.NDArray[Any]


def vision_inputs(
    geometry: VisionGeometry, pixel_values: Array, image_grid_thw: Array | None
) -> dict[str, Array]:
    """The feeds of vision.onnx.

    clip: pixel_values [images, 3, h, w] alone. qwen2_5_vl: pixel_values [patches, 3 * t * p * p]
    and, from image_grid_thw [images, 3] in patches: position_ids [patches, 2], window_index
    [tokens], cu_seqlens and cu_window_seqlens [segments + 1], all int64. Raises UsageError if the
    grids do not add up to the patches.
    """
    if geometry.kind == "clip":
        return {"pixel_values": pixel_values}
    if image_grid_thw is None or int(image_grid_thw.prod(axis=1).sum()) != len(pixel_values):
        raise UsageError(
            found=f"{len(pixel_values)} patches and image_grid_thw "
            + ("absent" if image_grid_thw is None else str(image_grid_thw.tolist())),
            expected="grids that add up to the patches",
            where="the vision inputs",
            remedy="pass both as the processor returned them",
        )
    grids = [(int(t), int(h), int(w)) for t, h, w in image_grid_thw]
    index, window_ends = _windows(grids, geometry)
    frames = np.concatenate([np.full(t, h * w) for t, h, w in grids])
    return {
        "pixel_values": pixel_values,
        "position_ids": np.concatenate([_patch_positions(g, geometry.merge) for g in grids]),
        "window_index": index,
        "cu_seqlens": np.concatenate([[0], np.cumsum(frames)]).astype(np.int64),
        "cu_window_seqlens": window_ends,
    }


def _patch_positions(grid: tuple[int, int, int], merge: int) -> Array:
    """(row, column) of every patch, [t * h * w, 2], merge block by merge block."""
    t, h, w = grid
    rows_columns = np.indices((h, w)).reshape(2, h // merge, merge, w // merge, merge)
    blocked = rows_columns.transpose(1, 3, 2, 4, 0).reshape(-1, 2)
    return np.tile(blocked, (t, 1)).astype(np.int64)


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
