"""From a model's configuration to its Description."""

from __future__ import annotations

import math
from typing import Any

from transformers import PreTrainedModel

from guardbake.vlm.catalog import Family

from guardbake_onnx.deepstack import deepstack_levels
from guardbake_onnx.description import Description, VisionGeometry


def describe(
    model: PreTrainedModel, family: Family, pad_id: int | None, model_digest: str
) -> Description:
    """Read the shapes and ids out of the transformers configuration; the model may be hollow."""
    config: Any = model.config
    text = config.get_text_config()
    return Description(
        family=family.name,
        model_digest=model_digest,
        layers=text.num_hidden_layers,
        kv_heads=text.num_key_value_heads,
        head_dim=head_dim(text),
        hidden=text.hidden_size,
        vocab=text.vocab_size,
        image_token_id=int(getattr(config, family.image_token)),
        end_ids=_end_ids(model, text),
        pad_id=0 if pad_id is None else pad_id,
        position=family.position,
        mask=family.mask,
        deepstack=deepstack_levels(model, family),
        vision=_geometry(family, config),
    )


def head_dim(text_config: Any) -> int:
    """Width of one attention head; older configurations leave it to be divided out."""
    declared = getattr(text_config, "head_dim", None)
    return int(declared or text_config.hidden_size // text_config.num_attention_heads)


def _end_ids(model: PreTrainedModel, text: Any) -> tuple[int, ...]:
    generation: Any = model.generation_config
    declared = None if generation is None else generation.eos_token_id
    if declared is None:
        declared = text.eos_token_id
    if declared is None:
        return ()
    return tuple(sorted({declared} if isinstance(declared, int) else set(declared)))


def _geometry(family: Family, config: Any) -> VisionGeometry:
    vision = config.vision_config
    patch, kind = _side(vision.patch_size), family.vision_kind
    if kind in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl"):
        window = vision.window_size if kind == "qwen2_5_vl" else 0
        table = math.isqrt(vision.num_position_embeddings) if kind == "qwen3_vl" else 0
        return VisionGeometry(
            kind, patch, vision.spatial_merge_size, window, 0, position_side=table
        )
    size = _side(vision.image_size)
    if kind != "anyres":
        return VisionGeometry(kind, patch, 1, 0, size)
    layouts = tuple((int(height), int(width)) for height, width in config.image_grid_pinpoints)
    ratio = getattr(config, "vision_aspect_ratio", None)
    limit = 0 if ratio is None else int(ratio.removeprefix("anyres_max_"))
    return VisionGeometry(kind, patch, 1, 0, size, layouts, limit)


def _side(size: Any) -> int:
    """One side of a square; InternVL spells both."""
    return int(size if isinstance(size, int) else size[0])
