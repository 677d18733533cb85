"""Trace a Qwen tower: packed patches of any number of images, each of any grid."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.export import Dim
from transformers import PreTrainedModel

from guardbake.vlm.catalog import Family

from guardbake_onnx.replicate import only_layers, template_layers
from guardbake_onnx.tower import Tower, stack_of
from guardbake_onnx.trace import attention_as, trace


class _Patches(torch.nn.Module):
    """The tower, told of its grids by index arrays alone."""

    def __init__(self, tower: torch.nn.Module) -> None:
        super().__init__()
        self.visual = tower

    def forward(
        self,
        pixel_values: torch.Tensor,
        position_ids: torch.Tensor,
        window_index: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
        cu_window_seqlens: torch.Tensor | None = None,
        interp_indices: torch.Tensor | None = None,
        interp_weights: torch.Tensor | None = None,
    ) -> Any:
        more: dict[str, Any] = {}
        if window_index is not None:
            more = {"window_index": window_index, "cu_window_seqlens": cu_window_seqlens}
            more["max_window_seqlen"] = 1
        if interp_indices is not None:
            more = {"interp_indices": interp_indices, "interp_weights": interp_weights}
        seen = self.visual(
            pixel_values,
            grid_thw=None,
            position_ids=position_ids,
            cu_seqlens=cu_seqlens,
            max_seqlen=1,
            **more,
        )
        levels = getattr(seen, "deepstack_features", None)
        if levels is None:
            return seen.pooler_output
        return seen.pooler_output, torch.stack(levels)


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


def trace_patches(model: PreTrainedModel, family: Family, whole: bool) -> Tower:
    """pixel_values [patches, 3 * t * p * p] and the index arrays of `grid.vision_inputs`."""
    tower: Any = model.get_submodule(family.vision)
    vision, stack = tower.config, stack_of(tower)
    kinds = [_kind(tower, layer) for layer in range(vision.depth)]
    traced = range(vision.depth) if whole else template_layers(kinds)
    inputs, dynamic = _example(vision, model.dtype, family)
    outputs = ["image_features", "deepstack_features"][: 1 + family.deepstack]
    # the packed branch, which hands the segments on, is taken for names with "flash" in them
    with (
        attention_as(vision, "flash_guardbake_segments", _segment_attention),
        only_layers(tower, stack, traced),
        _numbered(tower, "fullatt_block_indexes", traced),
        _numbered(tower, "deepstack_visual_indexes", traced),
    ):
        graph = trace(_Patches(tower), inputs, dynamic, list(inputs), outputs)
    return Tower(graph, {f"{family.vision.rpartition('.')[2]}.{stack}": kinds})


def _kind(tower: Any, layer: int) -> str:
    """What sets a layer apart: what it attends to, or a level of features that leaves after it."""
    if layer in getattr(tower, "deepstack_visual_indexes", ()):
        return f"level after {layer}"
    return "full" if layer in getattr(tower, "fullatt_block_indexes", (layer,)) else "window"


@contextlib.contextmanager
def _numbered(tower: Any, name: str, traced: Sequence[int]) -> Iterator[None]:
    """Let the tower's list of layer numbers, if it has one, count the traced layers alone."""
    before = getattr(tower, name, None)
    if before is None:
        yield
        return
    setattr(tower, name, [traced.index(number) for number in before if number in traced])
    try:
        yield
    finally:
        setattr(tower, name, before)


def _example(
    vision: Any, dtype: torch.dtype, family: Family
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Example inputs of two images, and their dynamic shapes."""
    merge = vision.spatial_merge_size**2
    tokens = Dim("tokens")
    patches = 12 * merge
    width = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    inputs = {
        "pixel_values": torch.zeros(patches, width, dtype=dtype),
        "position_ids": torch.zeros(patches, 2, dtype=torch.int64),
    }
    dynamic: dict[str, Any] = {name: {0: merge * tokens} for name in inputs}
    windows = family.vision_kind == "qwen2_5_vl"
    if windows:
        inputs["window_index"] = torch.arange(patches // merge)
        dynamic["window_index"] = {0: tokens}
    inputs["cu_seqlens"] = torch.tensor([0, 8 * merge, patches])
    dynamic["cu_seqlens"] = {0: Dim("segments")}
    if windows:
        ends = [0, 4 * merge, 7 * merge, 8 * merge, patches]
        inputs["cu_window_seqlens"] = torch.tensor(ends)
        dynamic["cu_window_seqlens"] = {0: Dim("windows")}
    if family.vision_kind == "qwen3_vl":
        inputs["interp_indices"] = torch.zeros(patches, 4, dtype=torch.int64)
        inputs["interp_weights"] = torch.zeros(patches, 4, dtype=dtype)
        dynamic |= {name: {0: merge * tokens} for name in ("interp_indices", "interp_weights")}
    return inputs, dynamic
