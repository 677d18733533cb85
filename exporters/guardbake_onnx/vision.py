"""Capture a vision tower with its projector: pixels in, one embedding per image token out."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import torch
from torch.export import Dim
from transformers import PreTrainedModel

from guardbake.vlm.catalog import Family

from guardbake_onnx import tidy
from guardbake_onnx.parameters import order_parameters
from guardbake_onnx.replicate import only_layers, replicate, template_layers
from guardbake_onnx.trace import attention_as, trace

_GRID_INPUTS = ("position_ids", "window_index", "cu_seqlens", "cu_window_seqlens")


def capture_vision(model: PreTrainedModel, family: Family, whole: bool = False) -> ir.Model:
    """The vision graph, parameters as inputs: feeds of `grid.vision_inputs` -> image_features.

    image_features [N, d]. Any number of images; for qwen2_5_vl any grids as well. whole: trace
    every layer instead of copying; the same graph in more time.
    """
    capture = _capture_clip if family.vision_kind == "clip" else _capture_qwen
    traced, layers, kinds = capture(model, family, whole)
    tidy.transpose_weights(traced)
    tidy.simplify(traced)
    if not whole:
        replicate(traced.graph, layers, kinds)
    tidy.name_by_module(traced, {}, {})
    tidy.strip_metadata(traced)
    order_parameters(
        traced.graph,
        {
            "vision_tower": family.vision,
            "multi_modal_projector": family.projector,
            "visual": family.vision,
        },
    )
    return traced


class _ClipVision(torch.nn.Module):
    """Tower, choice of hidden states and projector, as LlavaModel.get_image_features does it.

    Called in parts because that method returns one tensor per image, a list of fixed length.
    """

    def __init__(
        self, tower: torch.nn.Module, projector: torch.nn.Module, config: Any, layers: list[int]
    ) -> None:
        super().__init__()
        self.vision_tower = tower
        self.multi_modal_projector = projector
        self._layers = layers  # none: what the last layer hands on
        self._first = 1 if config.vision_feature_select_strategy == "default" else 0

    def forward(self, pixel_values: torch.Tensor) -> Any:
        if self._layers:
            states = self.vision_tower(pixel_values, output_hidden_states=True).hidden_states
            chosen = torch.cat([states[n] for n in self._layers], dim=-1)
        else:
            chosen = self.vision_tower(pixel_values).last_hidden_state
        chosen = chosen[:, self._first :]
        return self.multi_modal_projector(chosen).flatten(0, 1)


def _capture_clip(
    model: PreTrainedModel, family: Family, whole: bool
) -> tuple[ir.Model, str, list[str]]:
    config: Any = model.config
    tower: Any = model.get_submodule(family.vision)
    vision, stack = config.vision_config, _stack(tower)
    chosen = config.vision_feature_layer
    chosen = [chosen] if isinstance(chosen, int) else list(chosen)
    depth = vision.num_hidden_layers
    kinds = [f"layer {n}" for n in range(depth)]  # states of several layers leave: no copies
    if len(chosen) == 1 and chosen[0] % (depth + 1):  # no layer above the chosen one is needed
        kinds, chosen = ["layer"] * (chosen[0] % (depth + 1)), []
    traced = range(len(kinds)) if whole else template_layers(kinds)
    projector = model.get_submodule(family.projector)
    wrapper = _ClipVision(tower, projector, config, chosen)
    side = vision.image_size
    pixels = torch.zeros(2, vision.num_channels, side, side, dtype=model.dtype)
    with only_layers(tower, stack, traced):
        graph = trace(
            wrapper,
            {"pixel_values": pixels},
            {"pixel_values": {0: Dim("images")}},
            ["pixel_values"],
            ["image_features"],
        )
    return graph, f"vision_tower.{stack}", kinds


def _stack(tower: torch.nn.Module) -> str:
    """The path of the tower's list of layers within it."""
    lists = (n for n, part in tower.named_modules() if isinstance(part, torch.nn.ModuleList))
    return str(next(lists))


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


def _capture_qwen(
    model: PreTrainedModel, family: Family, whole: bool
) -> tuple[ir.Model, str, list[str]]:
    tower: Any = model.get_submodule(family.vision)
    vision, stack = tower.config, _stack(tower)
    full = tower.fullatt_block_indexes
    kinds = ["full" if n in full else "window" for n in range(vision.depth)]
    traced = range(vision.depth) if whole else template_layers(kinds)
    inputs, dynamic = _qwen_example(vision, model.dtype)
    names = ["pixel_values", *_GRID_INPUTS]
    # the packed branch, which hands the segments on, is taken for names with "flash" in them
    with (
        attention_as(vision, "flash_guardbake_segments", _segment_attention),
        only_layers(tower, stack, traced),
    ):
        tower.fullatt_block_indexes = [i for i, n in enumerate(traced) if kinds[n] == "full"]
        try:
            graph = trace(_QwenVision(tower), inputs, dynamic, names, ["image_features"])
        finally:
            tower.fullatt_block_indexes = full
    return graph, f"visual.{stack}", kinds


def _qwen_example(vision: Any, dtype: torch.dtype) -> tuple[dict[str, Any], dict[str, Any]]:
    """Example inputs of two images, and their dynamic shapes."""
    merge = vision.spatial_merge_size**2
    tokens, segments, windows = Dim("tokens"), Dim("segments"), Dim("windows")
    patches = 12 * merge
    width = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    inputs = {
        "pixel_values": torch.zeros(patches, width, dtype=dtype),
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
    return inputs, dynamic
