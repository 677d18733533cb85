"""From a loaded VLM to its Description."""

from __future__ import annotations

from typing import Any

from guardbake.vlm.load import Vlm

from guardbake_onnx.description import Description, VisionGeometry


def describe(vlm: Vlm) -> Description:
    """Read the shapes and ids out of the transformers configuration."""
    config: Any = vlm.model.config
    text = config.get_text_config()
    pad = vlm.processor.tokenizer.pad_token_id
    return Description(
        family=vlm.family.name,
        model_digest=vlm.model_digest,
        layers=text.num_hidden_layers,
        kv_heads=text.num_key_value_heads,
        head_dim=head_dim(text),
        hidden=text.hidden_size,
        vocab=text.vocab_size,
        image_token_id=vlm.image_token_id,
        end_ids=_end_ids(vlm, text),
        pad_id=0 if pad is None else int(pad),
        position=vlm.family.position,
        vision=_geometry(vlm, config.vision_config),
    )


def head_dim(text_config: Any) -> int:
    """Width of one attention head; older configurations leave it to be divided out."""
    declared = getattr(text_config, "head_dim", None)
    return int(declared or text_config.hidden_size // text_config.num_attention_heads)


def _end_ids(vlm: Vlm, text: Any) -> tuple[int, ...]:
    generation: Any = vlm.model.generation_config
    declared = None if generation is None else generation.eos_token_id
    if declared is None:
        declared = text.eos_token_id
    if declared is None:
        return ()
    return tuple(sorted({declared} if isinstance(declared, int) else set(declared)))


def _geometry(vlm: Vlm, vision: Any) -> VisionGeometry:
    if vlm.family.vision_kind == "clip":
        return VisionGeometry("clip", vision.patch_size, 1, 0, vision.image_size)
    return VisionGeometry(
        "qwen2_5_vl", vision.patch_size, vision.spatial_merge_size, vision.window_size, 0
    )
