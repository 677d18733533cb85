"""Which feature stands where when an image is laid out of its tiles, in numpy.

LLaVA-NeXT sees an image once as a whole and once in tiles. The tiles' features are put together as
the image was, the padding around it is cut away, every row ends in a newline (spatial_unpad of
LLaVA-NeXT; transformers' pack_image_features, which the tests compare with). LLaVA-OneVision
resamples what is larger than its limit (arXiv 2408.03326, section 3.2).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from guardbake.errors import UsageError

from guardbake_onnx.description import VisionGeometry

Array = npt.NDArray[Any]
_RESAMPLED = 1.1  # how far beyond the limit the side of a layout must be


def packed_features(
    geometry: VisionGeometry, tiles: int, image_tiling: Array | None
) -> dict[str, Array]:
    """feature_index [N] int64: 0 for the newline, 1 + n for feature n of all tiles in their order.

    image_tiling [images, 3]: tiles, height and width px. With a tile_limit feature_index is [N, 4]
    and there is feature_weight [N, 4] float32: a feature is the weighted sum of four. Raises
    UsageError if the tilings do not add up to the tiles.
    """
    if image_tiling is None or int(image_tiling[:, 0].sum()) != tiles:
        raise _mismatch(tiles, image_tiling)
    indices, weights, first = [], [], 1
    for count, height, width in image_tiling.tolist():
        rows, columns = _layout(geometry, height, width)
        if count != 1 + rows * columns:
            raise _mismatch(tiles, image_tiling)
        index, weight = _image(geometry, first, (height, width), (rows, columns))
        indices.append(index)
        weights.append(weight)
        first += count * (geometry.image_size // geometry.patch_size) ** 2
    index = np.concatenate(indices)
    if not geometry.tile_limit:
        return {"feature_index": index[:, 0]}
    return {"feature_index": index, "feature_weight": np.concatenate(weights)}


def _image(
    geometry: VisionGeometry, first: int, size: tuple[int, int], layout: tuple[int, int]
) -> tuple[Array, Array]:
    """One image's features, the whole's first: indices [n, 4] and weights [n, 4]."""
    side = geometry.image_size // geometry.patch_size
    whole = np.arange(side**2) + first
    rows, columns = layout
    tiles = np.arange(rows * columns * side**2).reshape(rows, columns, side, side)
    plan = tiles.transpose(0, 2, 1, 3).reshape(rows * side, columns * side) + first + side**2
    plan = _without_padding(plan, size)
    index, weight = _resampled(plan, geometry.tile_limit * side**2)
    lines = len(index)
    index = np.concatenate([index, np.zeros((lines, 1, 4), np.int64)], axis=1)
    weight = np.concatenate([weight, np.tile(np.eye(1, 4), (lines, 1, 1))], axis=1)
    alone = np.eye(1, 4).repeat(len(whole), axis=0)
    return (
        np.concatenate([np.stack([whole] * 4, axis=1), index.reshape(-1, 4)]).astype(np.int64),
        np.concatenate([alone, weight.reshape(-1, 4)]).astype(np.float32),
    )


def _layout(geometry: VisionGeometry, height: int, width: int) -> tuple[int, int]:
    """Rows and columns of the layout that keeps most of the image and wastes least."""

    def fitness(layout: tuple[int, int]) -> tuple[int, int]:
        scale = min(layout[1] / width, layout[0] / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, kept - layout[0] * layout[1]

    best = max(geometry.layouts, key=fitness)
    return best[0] // geometry.image_size, best[1] // geometry.image_size


def _without_padding(plan: Array, size: tuple[int, int]) -> Array:
    """The part of the plan [h, w] that an image of this height and width px covers."""
    (rows, columns), (height, width) = plan.shape, size
    if width / height > columns / rows:
        covered = int(round(height * (columns / width), 7))
        padding = (rows - covered) // 2
        return plan[padding : rows - padding]
    covered = int(round(width * (rows / height), 7))
    padding = (columns - covered) // 2
    return plan[:, padding : columns - padding]


def _resampled(plan: Array, limit: int) -> tuple[Array, Array]:
    """Four neighbours of each place and their weights, [h, w, 4] each; bilinear if too large."""
    rows, columns = plan.shape
    ratio = np.sqrt(rows * columns / limit) if limit else 1.0
    if ratio <= _RESAMPLED:
        return np.stack([plan] * 4, axis=-1), np.tile(np.eye(1, 4)[None], (rows, columns, 1))
    above, below, down = _neighbours(rows, int(rows // ratio))
    left, right, along = _neighbours(columns, int(columns // ratio))
    corners = [plan[np.ix_(a, b)] for a in (above, below) for b in (left, right)]
    weights = [np.outer(a, b) for a in (1 - down, down) for b in (1 - along, along)]
    return np.stack(corners, axis=-1), np.stack(weights, axis=-1)


def _neighbours(size: int, wanted: int) -> tuple[Array, Array, Array]:
    """For `wanted` places along an axis of this size: the two next to each, and the share of the
    second, pixel centres half a step in."""
    place = np.clip((np.arange(wanted) + 0.5) * (size / wanted) - 0.5, 0, None)
    low = np.floor(place).astype(np.int64)
    return low, np.minimum(low + 1, size - 1), place - low


def _mismatch(tiles: int, image_tiling: Array | None) -> UsageError:
    known = "absent" if image_tiling is None else str(image_tiling.tolist())
    return UsageError(
        found=f"{tiles} tiles and image_tiling {known}",
        expected="tiles, height and width of each image, adding up to the tiles",
        where="the vision inputs",
        remedy="pass both as the processor returned them",
    )
