"""From requests to arrays: chat template, left padding, image tokens and position ids. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from guardbake.batch import Batch
from guardbake.errors import UnsupportedError, UsageError
from guardbake.vlm.catalog import PositionKind, PromptKind

Array = npt.NDArray[Any]
Request = tuple[str, Image.Image | None]


def collate(
    processor: Any, image_token_id: int, requests: Sequence[Request], prompt: PromptKind = "chat"
) -> Batch:
    """Tokenise each request on its own as the family is asked, then left-pad.

    Each request is (text, image or None). One at a time, so that a request's tokens and pixels
    cannot depend on its neighbours in the batch. Raises UnsupportedError for an image that the
    processor pads, and for a text without one where the family is asked beside a picture always.
    """
    if not requests:
        raise UsageError(
            found="no request",
            expected="at least one",
            where="collate",
            remedy="pass a request",
        )
    encoded = [_encode(processor, text, image, prompt) for text, image in requests]
    length = max(e["input_ids"].shape[1] for e in encoded)
    ids = np.full((len(encoded), length), processor.tokenizer.pad_token_id or 0, np.int64)
    mask = np.zeros((len(encoded), length), np.int64)
    for row, one in enumerate(encoded):
        tokens = one["input_ids"][0]
        ids[row, length - len(tokens) :] = tokens
        mask[row, length - len(tokens) :] = 1
    return Batch(
        input_ids=ids,
        attention_mask=mask,
        image_mask=(ids == image_token_id) & (mask == 1),
        pixel_values=_concatenated([_whole_tiles(one) for one in encoded], "pixel_values"),
        image_grid_thw=_concatenated(encoded, "image_grid_thw"),
        image_tiling=_concatenated([_tiling(one) for one in encoded], "image_tiling"),
        instruction_ids=_instructions(encoded),
    )


def positions(
    kind: PositionKind,
    attention_mask: Array,
    *,
    image_mask: Array | None = None,
    image_grid_thw: Array | None = None,
    merge: int = 1,
) -> Array:
    """Position ids of a prompt, int64, 0 at padding: "sequential" [B, T], "mrope" [3, B, T].

    attention_mask: [B, T]. mrope only: image_mask [B, T], image_grid_thw [images, 3] in patches and
    merge, the patches per token along one side. Text counts up on all three axes; an image's
    tokens stand at (start + t, start + h, start + w), and text goes on after the larger of its
    height and width (Qwen2.5-VL, arXiv 2502.13923; transformers' get_rope_index, images only).
    """
    if kind == "sequential":
        return np.asarray(np.maximum(np.cumsum(attention_mask, axis=1) - 1, 0) * attention_mask)
    out = np.zeros((3, *attention_mask.shape), np.int64)
    pictures = np.zeros_like(attention_mask, bool) if image_mask is None else image_mask
    grids = iter([] if image_grid_thw is None else image_grid_thw.tolist())
    for row, real in enumerate(attention_mask == 1):
        blocks, start = [], 0
        for is_image, count in _runs(pictures[row][real]):
            # several images may stand side by side in one run
            while is_image and count > 0:
                t, h, w = _next_grid(grids, merge)
                blocks.append(np.indices((t, h, w)).reshape(3, -1) + start)
                start, count = start + max(h, w), count - t * h * w
            if count < 0:
                raise _grid_mismatch(f"{-count} image tokens too few")
            blocks.append(np.broadcast_to(np.arange(count) + start, (3, count)))
            start += count
        out[:, row, real] = np.concatenate(blocks, axis=1) if blocks else 0
    if next(grids, None) is not None:
        raise _grid_mismatch("more image grids than images in the tokens")
    return out


def next_positions(prompt_positions: Array, step: int) -> Array:
    """Position ids of the new token `step` (0 is the first after the prompt): [B, 1] or [3, B, 1].

    prompt_positions: what `positions` returned. With mrope the next token follows the prompt's
    largest position on any axis, which is transformers' rope delta applied to the length.
    """
    last = prompt_positions.max(axis=-1, keepdims=True)
    if prompt_positions.ndim == 3:
        last = np.broadcast_to(last.max(axis=0, keepdims=True), last.shape)
    return np.asarray(last + 1 + step)


def _encode(
    processor: Any, text: str, image: Image.Image | None, prompt: PromptKind
) -> dict[str, Array]:
    if prompt != "chat":
        mark = processor.image_token if prompt == "marked words" else ""
        return _encode_beside(processor, mark + text, image)
    content: list[dict[str, object]] = [] if image is None else [{"type": "image", "image": image}]
    content.append({"type": "text", "text": text})
    encoded = processor.apply_chat_template(
        [[{"role": "user", "content": content}]],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        processor_kwargs={"return_tensors": "np"},
    )
    return {key: np.asarray(value) for key, value in encoded.items()}


def _encode_beside(processor: Any, text: str, image: Image.Image | None) -> dict[str, Array]:
    if image is None:
        raise UnsupportedError(
            found="words without a picture",
            expected="words beside one: the family has no prompt for words alone",
            where="the model's processor",
            remedy='ask them beside a blank picture, the form "blank"',
        )
    encoded = processor(images=image, text=text, return_tensors="np")
    return {key: np.asarray(value) for key, value in encoded.items()}


def _whole_tiles(encoded: dict[str, Array]) -> dict[str, Array]:
    """Its pixels without the axis of requests, which processors that cut tiles put in front."""
    if "pixel_values" not in encoded or encoded["pixel_values"].ndim != 5:
        return encoded
    padded = encoded.get("pixel_attention_mask")
    if padded is not None and not padded.all():
        raise UnsupportedError(
            found=f"tiles of which {1 - padded.mean():.0%} is padding",
            expected="tiles filled by the image",
            where="the image processor",
            remedy="let it resize images to whole tiles",
        )
    return {"pixel_values": encoded["pixel_values"][0]}


def _tiling(encoded: dict[str, Array]) -> dict[str, Array]:
    """(tiles, height, width) of the request's image, where the processor keeps the image's size."""
    if "image_sizes" not in encoded:
        return {}
    tiles = np.array([[encoded["pixel_values"].shape[1]]])
    sizes = np.concatenate([tiles, encoded["image_sizes"]], axis=1)
    return {"image_tiling": sizes.astype(np.int64)}


def _instructions(encoded: Sequence[dict[str, Array]]) -> Array | None:
    """What a Q-Former reads beside each image, -1 beyond the end of the shorter ones."""
    rows = [one["qformer_input_ids"][0] for one in encoded if "qformer_input_ids" in one]
    if not rows:
        return None
    ids = np.full((len(rows), max(len(row) for row in rows)), -1, np.int64)
    for own, row in zip(ids, rows, strict=True):
        own[: len(row)] = row
    return ids


def _concatenated(encoded: Sequence[dict[str, Array]], key: str) -> Array | None:
    parts = [one[key] for one in encoded if key in one]
    return np.concatenate(parts) if parts else None


def _runs(flags: Array) -> list[tuple[bool, int]]:
    """Lengths of equal neighbours: [T] bool -> [(value, length), ...]."""
    edges = np.flatnonzero(np.diff(flags.astype(np.int8), prepend=-1, append=-1))
    return [(bool(flags[a]), int(b - a)) for a, b in pairwise(edges)]


def _next_grid(grids: Any, merge: int) -> tuple[int, int, int]:
    grid = next(grids, None)
    if grid is None:
        raise _grid_mismatch("an image in the tokens without a grid")
    t, h, w = grid
    return t, h // merge, w // merge


def _grid_mismatch(found: str) -> UnsupportedError:
    return UnsupportedError(
        found=found,
        expected="as many image tokens as the grids have merged patches",
        where="position ids",
        remedy="collate tokens and images with the same processor",
    )
