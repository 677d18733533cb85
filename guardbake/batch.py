"""A batch of requests as arrays: what every runner is fed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Batch:
    """Left-padded requests. B requests, T tokens.

    input_ids, attention_mask: [B, T] int64. image_mask: [B, T] bool, True at image tokens.
    pixel_values: the processor's own array, images of all requests one after another on axis 0
      (CLIP: [images, 3, h, w]; Qwen: [patches, 3 * t * p * p]); None if no request has an image.
    image_grid_thw: [images, 3] int64 in patches, Qwen only.
    """

    input_ids: Array
    attention_mask: Array
    image_mask: Array
    pixel_values: Array | None
    image_grid_thw: Array | None

    @property
    def text_mask(self) -> Array:
        """Tokens of words, [B, T] bool: neither padding nor image, nor the first real token.

        The first token draws attention and has many times the norm of the others, whatever the
        prompt says; a mean or a median over words must not hold it.
        """
        real = self.attention_mask == 1
        return np.asarray(real & ~self.image_mask & (self.attention_mask.cumsum(axis=1) > 1))

    @property
    def prompt_lengths(self) -> Array:
        """Real tokens of each prompt, [B] int64."""
        return np.asarray(self.attention_mask.sum(axis=1))


def without_images(batch: Batch) -> Batch:
    """The same prompts, their image tokens left out: left-padded again, [B, longest] tokens.

    Markers around an image (Qwen's vision_start and vision_end) are words and stay.
    """
    words = (batch.attention_mask == 1) & ~batch.image_mask
    longest = int(words.sum(axis=1).max())
    ids = np.zeros((len(words), longest), np.int64)
    mask = np.zeros_like(ids)
    for row, kept in enumerate(words):
        real = batch.input_ids[row, kept]
        ids[row] = real[0]  # padding: any token that is no image's
        ids[row, longest - len(real) :] = real
        mask[row, longest - len(real) :] = 1
    return Batch(ids, mask, np.zeros_like(mask, bool), None, None)
