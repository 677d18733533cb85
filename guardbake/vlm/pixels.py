"""From an image's own pixels to what the vision tower is fed, as a differentiable map.

An image processor that need not resize only moves pixels about and normalises them: every number it
leaves is offset + scale * one channel of one pixel. The three are found by showing it pictures, so
that no family's patch order is written down here twice, and are checked on one more picture.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from guardbake.errors import UnsupportedError
from guardbake.vlm.load import Vlm
from guardbake.vlm.requests import collated

Bytes = npt.NDArray[np.uint8]
_ROUNDINGS = 8  # float32 roundings between a byte and its normalised value, on both ways, at most


@dataclass(frozen=True, eq=False)
class PixelPath:
    """How images of height x width px reach `pixel_values`.

    index [M] int64: which of the image's height * width * 3 numbers; scale, offset [M] float32;
    shape: of one image's pixel_values, M numbers.
    """

    height: int
    width: int
    index: Tensor
    scale: Tensor
    offset: Tensor
    shape: tuple[int, ...]

    def values(self, images: Tensor) -> Tensor:
        """[N, height, width, 3] in [0, 1] -> pixel_values of N images, on axis 0 as in a `Batch`.

        Linear, with gradient.
        """
        flat = images.reshape(len(images), -1)[:, self.index]
        values = self.offset + self.scale * flat
        return values.reshape(len(images) * self.shape[0], *self.shape[1:])

    def picture(self, values: Tensor) -> Bytes:
        """The image [height, width, 3] of 8 bit whose pixel_values are nearest to `values`."""
        flat = torch.zeros(self.height * self.width * 3)
        flat[self.index] = (values.reshape(-1) - self.offset) / self.scale
        levels = (flat.clamp(0, 1) * 255).round().to(torch.uint8)
        return np.asarray(levels.reshape(self.height, self.width, 3).numpy())


def pixel_path(vlm: Vlm, height: int, width: int) -> PixelPath:
    """The path of images that the processor takes without resizing.

    Raises UnsupportedError if it does resize images of this size, or does anything else to them
    than to move and to normalise.
    """
    count = height * width * 3
    whole = np.arange(count)

    def fed(levels: npt.NDArray[Any]) -> Tensor:
        return _processed(vlm, levels.astype(np.uint8).reshape(height, width, 3))

    offset = fed(np.zeros(count))
    scale = fed(np.full(count, 255)) - offset
    index = _index(fed, whole, offset, scale)
    shape = tuple(offset.shape)
    path = PixelPath(height, width, index, scale.reshape(-1), offset.reshape(-1), shape)
    check = np.random.default_rng(0).integers(0, 256, (1, height, width, 3), np.uint8)
    found, expected = path.values(torch.from_numpy(check) / 255), fed(check)
    largest = float(expected.abs().max())
    if not float((found - expected).abs().max()) <= _ROUNDINGS * 2.0**-24 * max(1.0, largest):
        raise _not_linear(height, width)
    return path


def as_seen(vlm: Vlm, images: Sequence[Image.Image]) -> list[Bytes]:
    """The images after the processor's own resizing and cropping, [h, w, 3] of 8 bit each.

    Shown again, they are not resized any more. Raises UnsupportedError as `pixel_path` does.
    """
    paths: dict[tuple[int, int], PixelPath] = {}
    out = []
    for image in images:
        batch = collated(vlm, [("", image)])
        assert batch.pixel_values is not None
        if batch.image_grid_thw is None:
            height, width = batch.pixel_values.shape[-2:]
        else:
            patch = int(vlm.processor.image_processor.patch_size)
            height, width = (int(n) * patch for n in batch.image_grid_thw[0, 1:])
        if (height, width) not in paths:
            paths[height, width] = pixel_path(vlm, height, width)
        out.append(paths[height, width].picture(torch.from_numpy(batch.pixel_values)))
    return out


def _index(
    fed: Callable[[npt.NDArray[Any]], Tensor],
    whole: npt.NDArray[Any],
    offset: Tensor,
    scale: Tensor,
) -> Tensor:
    """Where each number comes from: three pictures spell every place in bytes."""
    index = torch.zeros(offset.numel(), dtype=torch.int64)
    for digit in range(3):
        level = (fed((whole >> 8 * digit) & 255) - offset) / scale
        index += (level.reshape(-1) * 255).round().long() << 8 * digit
    return index.clamp(0, len(whole) - 1)  # nonsense is found by the check on one more picture


def _processed(vlm: Vlm, levels: Bytes) -> Tensor:
    batch = collated(vlm, [("", Image.fromarray(levels))])
    assert batch.pixel_values is not None
    return torch.from_numpy(batch.pixel_values)


def _not_linear(height: int, width: int) -> UnsupportedError:
    return UnsupportedError(
        found="an image processor that mixes pixels",
        expected="one that moves and normalises images of its own size",
        where=f"images of {width} x {height} px",
        remedy="attack at the size to which the processor resizes",
    )
