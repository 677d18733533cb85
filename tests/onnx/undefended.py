"""What transformers computes when called directly: nothing of ours takes part but the batch."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from guardbake.batch import Batch
from guardbake.vlm.load import Vlm

# fp32 on both sides. The largest difference seen was 3e-5, where logits reach 11; there torch in
# fp32 is itself 3.6e-5 away from torch in fp64, and onnxruntime 1.4e-5.
LOGITS = 1e-4


def torch_trace(vlm: Vlm, batch: Batch, forced: Any) -> tuple[Any, Any]:
    """Prefill logits [B, T, V] and the logits of each step [B, n, V], fed with forced [B, n].

    Positions come from get_rope_index or the mask; a PaliGemma's count from 1, as generate() has
    them.
    """
    model: Any = vlm.model
    # an InstructBLIP takes no step without an image: its text model does
    text = model if vlm.family.vision_kind != "qformer" else model.language_model
    ids, mask = torch.from_numpy(batch.input_ids), torch.from_numpy(batch.attention_mask)
    images = _images(vlm, batch)
    if vlm.family.position == "mrope":
        kinds = torch.from_numpy(batch.image_mask.astype(np.int64))
        grid = images.get("image_grid_thw")
        positions, delta = model.model.get_rope_index(ids, kinds, grid, attention_mask=mask)
        images["mm_token_type_ids"] = kinds
        after = (mask.sum(1, keepdim=True) + delta)[None].expand(3, -1, -1)
    else:
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        after = mask.sum(1, keepdim=True)
    if vlm.family.mask == "prefix":
        positions, after = positions + 1, after + 1
    with torch.no_grad():
        out = model(
            input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True, **images
        )
        prefill, steps = out.logits, [out.logits[:, -1]]
        for step in range(forced.shape[1] - 1):
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
            out = text(
                input_ids=torch.from_numpy(forced[:, step : step + 1]),
                attention_mask=mask,
                position_ids=after + step,
                past_key_values=getattr(out, "language_model_outputs", out).past_key_values,
                use_cache=True,
            )
            steps.append(out.logits[:, -1])
    return prefill.numpy(), torch.stack(steps, dim=1).numpy()


def _images(vlm: Vlm, batch: Batch) -> dict[str, Any]:
    images: dict[str, Any] = {}
    if vlm.family.mask == "image":
        images["token_type_ids"] = torch.from_numpy(batch.image_mask.astype(np.int64))
    if vlm.family.mask == "prefix":
        images["token_type_ids"] = torch.zeros(batch.input_ids.shape, dtype=torch.int64)
    if batch.pixel_values is not None:
        pixels = torch.from_numpy(batch.pixel_values)
        images["pixel_values"] = pixels[None] if vlm.family.vision_kind == "idefics3" else pixels
    if batch.image_grid_thw is not None:
        images["image_grid_thw"] = torch.from_numpy(batch.image_grid_thw)
    if batch.instruction_ids is not None:
        ids = torch.from_numpy(batch.instruction_ids)
        images["qformer_input_ids"] = ids.clamp(min=0)
        images["qformer_attention_mask"] = (ids >= 0).long()
    if batch.image_tiling is not None:
        images["image_sizes"] = torch.from_numpy(batch.image_tiling[:, 1:])
    return images
