"""From a batch to what enters the decoder: embeddings, image features and position ids.

All three are transformers' own, so that the ONNX side's are compared with something independent of
it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from guardbake.batch import Batch, mutual_tokens
from guardbake.vlm.catalog import Family
from guardbake.vlm.load import Vlm


@dataclass(frozen=True, eq=False)
class Prompt:
    """Ready for the decoder: embeds [B, T, d], positions [B, T] or [3, B, T], mask [B, T].

    image: [B, T] bool, the image tokens. deepstack: [levels, B, T, d], added at image tokens to the
    residual that leaves layer 0, 1, ...; None if the family has no such thing, or without images.
    mutual: [B, T] bool, see `batch.mutual_tokens`; None if there are none.
    """

    embeds: Tensor
    positions: Tensor
    mask: Tensor
    image: Tensor
    deepstack: Tensor | None = None
    mutual: Tensor | None = None


def prepare(vlm: Vlm, batch: Batch, pixels: Tensor | None = None) -> Prompt:
    """Embeddings with image features in their places, and positions, as transformers has them.

    pixels: in place of the batch's own pixel_values, of their shape; gradients reach them.
    """
    inner: Any = getattr(vlm.model, "model", vlm.model)
    ids, mask = torch.from_numpy(batch.input_ids), torch.from_numpy(batch.attention_mask)
    embeds = vlm.model.get_input_embeddings()(ids)
    deepstack = None
    grid = None if batch.image_grid_thw is None else torch.from_numpy(batch.image_grid_thw)
    if batch.pixel_values is not None:
        shown = torch.from_numpy(batch.pixel_values) if pixels is None else pixels
        arguments = image_arguments(vlm.family, batch, shown.to(embeds.dtype))
        features = inner.get_image_features(**arguments)
        place = torch.from_numpy(batch.image_mask)[..., None].expand_as(embeds)
        embeds = _placed(embeds, place, features.pooler_output)
        if vlm.family.deepstack:
            nothing = torch.zeros_like(embeds)
            levels = [_placed(nothing, place, level) for level in features.deepstack_features]
            deepstack = torch.stack(levels)
    if vlm.family.position == "mrope":
        kinds = torch.from_numpy(batch.image_mask.astype(np.int64))
        positions, _ = inner.get_rope_index(
            ids, mm_token_type_ids=kinds, image_grid_thw=grid, attention_mask=mask
        )
    else:
        positions = (mask.cumsum(1) - 1).clamp(min=0)
    mutual = torch.from_numpy(mutual_tokens(batch, vlm.family.mask))
    return Prompt(
        embeds,
        positions,
        mask,
        torch.from_numpy(batch.image_mask),
        deepstack,
        mutual if mutual.any() else None,
    )


def _placed(embeds: Tensor, place: Tensor, features: Sequence[Tensor] | Tensor) -> Tensor:
    """embeds [B, T, d] with the images' features, of one image after another, where place is."""
    flat = torch.cat(list(features)).reshape(-1, embeds.shape[-1]).to(embeds.dtype)
    return embeds.masked_scatter(place, flat)


def image_arguments(family: Family, batch: Batch, pixels: Tensor) -> dict[str, Tensor]:
    """What transformers' `get_image_features` of this family wants of a batch with images."""
    if batch.image_grid_thw is not None:
        return {"pixel_values": pixels, "image_grid_thw": torch.from_numpy(batch.image_grid_thw)}
    if batch.image_tiling is not None:
        sizes = torch.from_numpy(batch.image_tiling[:, 1:])
        return {"pixel_values": pixels, "image_sizes": sizes}
    if batch.instruction_ids is not None:
        ids = torch.from_numpy(batch.instruction_ids)
        read = {"qformer_input_ids": ids.clamp(min=0), "qformer_attention_mask": (ids >= 0).long()}
        return {"pixel_values": pixels} | read
    # Idefics3 counts the tiles of each request; here they are one request's
    tiled = family.vision_kind == "idefics3"
    return {"pixel_values": pixels[None] if tiled else pixels}
