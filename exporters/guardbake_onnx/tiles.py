"""Trace a tower that is fed tiles of one size: a whole image, or the pieces it is cut into.

Called in parts, as the model's own get_image_features calls them: that method returns one tensor
per image, a list of fixed length.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.export import Dim
from transformers import PreTrainedModel

from guardbake.vlm.catalog import Family

from guardbake_onnx.replicate import only_layers, template_layers
from guardbake_onnx.tower import Tower, full_attention, stack_of
from guardbake_onnx.trace import attention_as, trace

NEWLINE = "image_newline"


class _Tiles(torch.nn.Module):
    """Tower, choice of hidden states, and projector, each under its own name in the model.

    states: which hidden states to put side by side; none for what the tower returns.
    """

    def __init__(self, model: PreTrainedModel, family: Family, states: list[int]) -> None:
        super().__init__()
        config: Any = model.config
        self._tower = family.vision.rpartition(".")[2]
        self._projector = family.projector.rpartition(".")[2]
        self.add_module(self._tower, model.get_submodule(family.vision))
        self.add_module(self._projector, model.get_submodule(family.projector))
        self._states = states
        strategy = getattr(config, "vision_feature_select_strategy", "full")
        self._first = 1 if strategy == "default" else 0
        self._shuffle = family.vision_kind == "internvl"
        self._scale = getattr(config, "downsample_ratio", 1.0)

    def forward(self, pixel_values: torch.Tensor) -> Any:
        return self._project(self._chosen(pixel_values)).flatten(0, 1)

    def _chosen(self, pixel_values: torch.Tensor) -> torch.Tensor:
        tower: Any = self.get_submodule(self._tower)
        if not self._states:
            chosen: torch.Tensor = tower(pixel_values).last_hidden_state
        else:
            states = tower(pixel_values, output_hidden_states=True).hidden_states
            chosen = torch.cat([states[n] for n in self._states], dim=-1)
        return chosen[:, self._first :]

    def _project(self, chosen: torch.Tensor) -> torch.Tensor:
        projector: Any = self.get_submodule(self._projector)
        projected: torch.Tensor = projector(self._shuffled(chosen) if self._shuffle else chosen)
        return projected

    def _shuffled(self, chosen: torch.Tensor) -> torch.Tensor:
        """InternVL's pixel shuffle: squares of neighbouring patches become one, channels joined."""
        step, side = round(1 / self._scale), int(chosen.shape[1] ** 0.5)
        squares = chosen.reshape(-1, side // step, step, side // step, step, chosen.shape[-1])
        return squares.permute(0, 1, 3, 2, 4, 5).flatten(3).flatten(1, 2)


class _PackedTiles(_Tiles):
    """The same, and the image laid out of its tiles: rows of `anyres.packed_features`."""

    def __init__(self, model: PreTrainedModel, family: Family, states: list[int]) -> None:
        super().__init__(model, family, states)
        inner: Any = model.get_submodule(family.vision.rpartition(".")[0])
        self.register_parameter(NEWLINE, inner.get_parameter(NEWLINE))

    def forward(  # type: ignore[override]
        self,
        pixel_values: torch.Tensor,
        feature_index: torch.Tensor,
        feature_weight: torch.Tensor | None = None,
    ) -> Any:
        newline = self.get_parameter(NEWLINE)
        rows = torch.cat([newline[None], super().forward(pixel_values)])
        if feature_weight is None:
            return rows[feature_index]
        taps = zip(feature_index.unbind(1), feature_weight.unbind(1), strict=True)
        return sum(rows[index] * weight[:, None] for index, weight in taps)


def trace_tiles(model: PreTrainedModel, family: Family, whole: bool) -> Tower:
    """pixel_values [tiles, 3, h, w], for "anyres" feature_index too (see `anyres`)."""
    tower: Any = model.get_submodule(family.vision)
    vision, stack = tower.config, stack_of(tower)
    kinds, states = _layers(model.config, family, vision.num_hidden_layers)
    traced = range(len(kinds)) if whole else template_layers(kinds)
    height, width = _pair(vision.image_size)
    shape = (2, vision.num_channels, height, width)
    inputs = {"pixel_values": torch.zeros(shape, dtype=model.dtype)}
    dynamic: dict[str, Any] = {"pixel_values": {0: Dim("images")}}
    if family.vision_kind == "anyres":
        _add_places(inputs, dynamic, resampled=hasattr(model.config, "vision_aspect_ratio"))
    module = (_PackedTiles if family.vision_kind == "anyres" else _Tiles)(model, family, states)
    with (
        attention_as(vision, "guardbake_full", full_attention),
        only_layers(tower, stack, traced),
    ):
        graph = trace(module, inputs, dynamic, list(inputs), ["image_features"])
    return Tower(graph, {f"{family.vision.rpartition('.')[2]}.{stack}": kinds})


def _layers(config: Any, family: Family, depth: int) -> tuple[list[str], list[int]]:
    """The kind of every layer that is needed, and which of their states are taken (see _Tiles)."""
    chosen = getattr(config, "vision_feature_layer", None)
    if chosen is None or (family.vision_kind == "internvl" and chosen == -1):
        return ["layer"] * depth, []
    if isinstance(chosen, int) or len(chosen) == 1:
        above = (chosen if isinstance(chosen, int) else chosen[0]) % (depth + 1)
        if above:  # no layer above the chosen one is needed
            return ["layer"] * above, [-1]
    states = [chosen] if isinstance(chosen, int) else list(chosen)
    return [f"layer {n}" for n in range(depth)], states  # states of several leave: no copies


def _add_places(inputs: dict[str, torch.Tensor], dynamic: dict[str, Any], resampled: bool) -> None:
    features = Dim("features")
    shape = (7, 4) if resampled else (7,)
    inputs["feature_index"] = torch.zeros(shape, dtype=torch.int64)
    dynamic["feature_index"] = {0: features}
    if resampled:
        inputs["feature_weight"] = torch.zeros(shape, dtype=inputs["pixel_values"].dtype)
        dynamic["feature_weight"] = {0: features}


def _pair(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
