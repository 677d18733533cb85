"""Capture a vision tower with its projector: pixels in, one embedding per image token out."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import torch
from torch.export import Dim

from guardbake.vlm.load import Vlm

from guardbake_onnx import tidy
from guardbake_onnx.trace import attention_as, trace

_GRID_INPUTS = ("position_ids", "window_index", "cu_seqlens", "cu_window_seqlens")


def capture_vision(vlm: Vlm) -> ir.Model:
    """The vision graph, weights in memory: feeds of `grid.vision_inputs` -> image_features [N, d].

    Any number of images; for qwen2_5_vl any grids as well.
    """
    model = _capture_clip(vlm) if vlm.family.vision_kind == "clip" else _capture_qwen(vlm)
    tidy.transpose_weights(model)
    tidy.simplify(model)
    tidy.name_by_module(model, {}, {})
    tidy.strip_metadata(model)
    return model


class _ClipVision(torch.nn.Module):
    """Tower, choice of hidden states and projector, as LlavaModel.get_image_features does it.

    Called in parts because that method returns one tensor per image, a list of fixed length.
    """

    def __init__(self, tower: torch.nn.Module, projector: torch.nn.Module, config: Any) -> None:
        super().__init__()
        self.vision_tower = tower
        self.multi_modal_projector = projector
        chosen = config.vision_feature_layer
        self._layers = [chosen] if isinstance(chosen, int) else list(chosen)
        self._first = 1 if config.vision_feature_select_strategy == "default" else 0

    def forward(self, pixel_values: torch.Tensor) -> Any:
        states = self.vision_tower(
            pixel_values, output_hidden_states=True, return_dict=True
        ).hidden_states
        chosen = torch.cat([states[n][:, self._first :] for n in self._layers], dim=-1)
        return self.multi_modal_projector(chosen).flatten(0, 1)


def _capture_clip(vlm: Vlm) -> ir.Model:
    family, config = vlm.family, vlm.model.config
    tower = vlm.model.get_submodule(family.vision)
    wrapper = _ClipVision(tower, vlm.model.get_submodule(family.projector), config)
    vision: Any = config.vision_config
    side = vision.image_size
    pixels = torch.zeros(2, vision.num_channels, side, side, dtype=vlm.model.dtype)
    return trace(
        wrapper,
        {"pixel_values": pixels},
        {"pixel_values": {0: Dim("images")}},
        ["pixel_values"],
        ["image_features"],
    )


class _QwenVision(torch.nn.Module):
    def __init__(self, tower: torch.nn.Module) -> None:
        super().__init__()
        self.visual = tower

    def forward(
        self,
        pixel_values: torch.Tensor,
        position_ids: torch.Tensor,
        window_index: torch.Tensor,
        cu_seqlens: torch.Tensor,
        cu_window_seqlens: torch.Tensor,
    ) -> Any:
        return self.visual(
            pixel_values,
            grid_thw=None,
            position_ids=position_ids,
            window_index=window_index,
            cu_seqlens=cu_seqlens,
            cu_window_seqlens=cu_window_seqlens,
            max_seqlen=1,
            max_window_seqlen=1,
        ).pooler_output


def _segment_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    cu_seq_lens_q: torch.Tensor | None = None,
    **unused: object,
) -> tuple[torch.Tensor, None]:
    """Attention within the segments that end at cu_seq_lens_q, by one mask [patches, patches].

    transformers' own path splits by a Python list, which fixes the grid at capture.
    """
    if cu_seq_lens_q is None:
        raise AssertionError("the packed branch always passes the segments")
    place = torch.arange(query.shape[2], device=query.device)
    segment = (place[:, None] >= cu_seq_lens_q[None, 1:]).sum(-1)
    mask = (segment[:, None] == segment[None, :])[None, None]
    attended = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=scaling
    )
    return attended.transpose(1, 2), None


def _capture_qwen(vlm: Vlm) -> ir.Model:
    tower: Any = vlm.model.get_submodule(vlm.family.vision)
    vision = tower.config
    merge = vision.spatial_merge_size**2
    tokens, segments, windows = Dim("tokens"), Dim("segments"), Dim("windows")
    patches = 12 * merge
    width = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    inputs = {
        "pixel_values": torch.zeros(patches, width, dtype=vlm.model.dtype),
        "position_ids": torch.zeros(patches, 2, dtype=torch.int64),
        "window_index": torch.arange(patches // merge),
        "cu_seqlens": torch.tensor([0, 8 * merge, patches]),
        "cu_window_seqlens": torch.tensor([0, 4 * merge, 7 * merge, 8 * merge, patches]),
    }
    dynamic = {
        "pixel_values": {0: merge * tokens},
        "position_ids": {0: merge * tokens},
        "window_index": {0: tokens},
        "cu_seqlens": {0: segments},
        "cu_window_seqlens": {0: windows},
    }
    names = ["pixel_values", *_GRID_INPUTS]
    # the packed branch, which hands the segments on, is taken for names with "flash" in them
    with attention_as(vision, "flash_guardbake_segments", _segment_attention):
        return trace(_QwenVision(tower), inputs, dynamic, names, ["image_features"])
