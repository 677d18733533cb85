"""A batch of requests as arrays: what every runner is fed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
MaskKind = Literal["causal", "image", "prefix"]
"""What a token attends to: "causal" itself and what is before it, "image" at a token of an image
all of that image too, "prefix" at a token of the prompt the whole prompt."""


@dataclass(frozen=True)
class Batch:
    """Left-padded requests. B requests, T tokens.

    input_ids, attention_mask: [B, T] int64. image_mask: [B, T] bool, True at image tokens.
    pixel_values: the processor's own array, images of all requests one after another on axis 0
      (Qwen: [patches, 3 * t * p * p]; others: [tiles, 3, h, w]); None if no request has an image.
    image_grid_thw: [images, 3] int64 in patches, Qwen only.
    image_tiling: [images, 3] int64, LLaVA-NeXT and OneVision only: tiles, height and width px.
    instruction_ids: [images, longest] int64, InstructBLIP only: the words beside each image as its
      Q-Former's own tokenizer has them, -1 beyond their end.
    answered: how many columns on the right are no longer prompt but answer.
    """

    input_ids: Array
    attention_mask: Array
    image_mask: Array
    pixel_values: Array | None
    image_grid_thw: Array | None
    answered: int = 0
    image_tiling: Array | None = None
    instruction_ids: Array | None = None

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
        return np.asarray(self.attention_mask.sum(axis=1) - self.answered)


def without_images(batch: Batch) -> Batch:
    """The same prompts, their image tokens left out: left-padded again, [B, longest] tokens.

    Markers around an image (Qwen's vision_start and vision_end) are words and stay.
    """
    words = (batch.attention_mask == 1) & ~batch.image_mask
    words[:, words.shape[1] - batch.answered :] = False
    longest = int(words.sum(axis=1).max())
    ids = np.zeros((len(words), longest), np.int64)
    mask = np.zeros_like(ids)
    for row, kept in enumerate(words):
        real = batch.input_ids[row, kept]
        ids[row] = real[0]  # padding: any token that is no image's
        ids[row, longest - len(real) :] = real
        mask[row, longest - len(real) :] = 1
    return Batch(ids, mask, np.zeros_like(mask, bool), None, None)


def mutual_tokens(batch: Batch, kind: MaskKind) -> Array:
    """[B, T] bool: the tokens that see each other, later ones too, where they stand side by side.

    With "prefix" those are a prompt's, image and words, and none of its answer's.
    """
    if kind == "image":
        return batch.image_mask
    mutual = np.asarray((batch.attention_mask == 1) & (kind == "prefix"))
    mutual[:, mutual.shape[1] - batch.answered :] = False
    return mutual


def prefill_stops(batch: Batch, chunk: int | None, kind: MaskKind) -> list[int]:
    """After which columns a prefill in pieces of `chunk` tokens stops, the last one included.

    No piece ends between two tokens that see each other; such a piece is longer. A prefix is one.
    """
    columns = batch.image_mask.shape[1]
    chunk = chunk or columns
    goes_on = np.zeros(columns + 1, bool)
    mutual = mutual_tokens(batch, kind)
    goes_on[1:columns] = (mutual[:, 1:] & mutual[:, :-1]).any(axis=0)
    stops: list[int] = []
    while not stops or stops[-1] < columns:
        stop = min((stops[-1] if stops else 0) + chunk, columns)
        while goes_on[stop]:
            stop += 1
        stops.append(stop)
    return stops


def in_groups(batch: Batch, most: int | None) -> list[Batch]:
    """The requests in their order, at most `most` in a batch, padded as they were; None: any."""
    total = len(batch.input_ids)
    if most is None or total <= most:
        return [batch]
    return [_rows(batch, start, min(start + most, total)) for start in range(0, total, most)]


def alone(batch: Batch, row: int) -> Batch:
    """One request of the batch without its padding, and with its own images."""
    one = _rows(batch, row, row + 1)
    real = one.attention_mask[0] == 1
    return replace(
        one,
        input_ids=one.input_ids[:, real],
        attention_mask=one.attention_mask[:, real],
        image_mask=one.image_mask[:, real],
    )


def _rows(batch: Batch, start: int, stop: int) -> Batch:
    """Requests `start` to `stop`, not including it, with their own images."""
    pixels, grid, tiling = batch.pixel_values, batch.image_grid_thw, batch.image_tiling
    instruction = batch.instruction_ids
    if pixels is not None:
        own, size = _own_images(batch, start, stop, len(pixels))
        grid = grid[own] if grid is not None and own.any() else None
        tiling = tiling[own] if tiling is not None and own.any() else None
        if instruction is not None:
            instruction = instruction[own]
            instruction = instruction[:, (instruction >= 0).any(axis=0)] if own.any() else None
        pixels = pixels[np.repeat(own, size)] if own.any() else None
    return Batch(
        batch.input_ids[start:stop],
        batch.attention_mask[start:stop],
        batch.image_mask[start:stop],
        pixels,
        grid,
        batch.answered,
        tiling,
        instruction,
    )


def _own_images(batch: Batch, start: int, stop: int, pixel_rows: int) -> tuple[Array, Array]:
    """Which images are of requests `start` to `stop`, not including it, [images] bool, and how many
    rows of pixels each takes up."""
    if batch.image_tiling is not None:  # cut to its own shape, so told apart by its request alone
        shown = np.flatnonzero(batch.image_mask.any(axis=1))
        return (shown >= start) & (shown < stop), batch.image_tiling[:, 0]
    grid = batch.image_grid_thw
    size = np.ones(pixel_rows, np.int64) if grid is None else grid.prod(axis=1)
    # an image takes up tokens as it takes up patches, so rows of images end where tokens do
    ends = size.cumsum() * int(batch.image_mask.sum()) // int(size.sum())
    before, after = (int(batch.image_mask[:row].sum()) for row in (start, stop))
    return (ends > before) & (ends <= after), size
