"""Capture a vision tower with its projector: pixels in, one embedding per image token out."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import onnx_ir as ir
from transformers import PreTrainedModel

from guardbake.vlm.catalog import Family, VisionKind

from guardbake_onnx import tidy
from guardbake_onnx.parameters import order_parameters
from guardbake_onnx.patches import trace_patches
from guardbake_onnx.queries import QFORMER, QUERIES, trace_queries
from guardbake_onnx.replicate import replicate
from guardbake_onnx.tiles import NEWLINE, trace_tiles
from guardbake_onnx.tower import Tower

_TRACES: Mapping[VisionKind, Callable[[PreTrainedModel, Family, bool], Tower]] = {
    "anyres": trace_tiles,
    "clip": trace_tiles,
    "idefics3": trace_tiles,
    "internvl": trace_tiles,
    "qformer": trace_queries,
    "qwen2_5_vl": trace_patches,
    "qwen2_vl": trace_patches,
    "qwen3_vl": trace_patches,
    "siglip": trace_tiles,
}


def capture_vision(model: PreTrainedModel, family: Family, whole: bool = False) -> ir.Model:
    """The vision graph, parameters as inputs: feeds of `grid.vision_inputs` -> image_features.

    image_features [N, d], and with deepstack deepstack_features [levels, N, d]. Any number of
    images and tiles; any grids where the tower takes patches. whole: trace every layer instead of
    copying; the same graph in more time.
    """
    tower = _TRACES[family.vision_kind](model, family, whole)
    traced = tower.graph
    tidy.transpose_weights(traced)
    tidy.simplify(traced)
    if not whole:
        for path, kinds in tower.stacks.items():
            replicate(traced.graph, path, kinds)
    tidy.name_by_module(traced, {}, {})
    tidy.strip_metadata(traced)
    parent = family.vision.rpartition(".")[0]
    parts = [path for path in (family.vision, family.projector) if path]
    parts += [f"{parent}.{name}".lstrip(".") for name in (NEWLINE, QFORMER, QUERIES)]
    roots = {path.rpartition(".")[2]: path for path in parts}
    order_parameters(traced.graph, roots)
    return traced
