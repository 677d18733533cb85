"""A vision tower as traced: what `tiles` and `patches` hand to `vision`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch


@dataclass(frozen=True)
class Tower:
    """graph: as `trace` left it. stacks: by path of a stack of layers in it the kind of every layer
    of the whole stack; the graph has those of `template_layers(kinds)` or all."""

    graph: ir.Model
    stacks: Mapping[str, list[str]]


def stack_of(tower: torch.nn.Module) -> str:
    """The path of the tower's list of layers within it."""
    lists = (n for n, part in tower.named_modules() if isinstance(part, torch.nn.ModuleList))
    return str(next(lists))


def full_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **unused: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention signature; every patch of a tile sees every other one."""
    attended = torch.nn.functional.scaled_dot_product_attention(query, key, value, scale=scaling)
    return attended.transpose(1, 2).contiguous(), None
