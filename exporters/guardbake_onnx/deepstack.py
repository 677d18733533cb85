"""DeepStack: image features of several depths of the tower, added to the first decoder layers.

arXiv 2406.04334, as Qwen3-VL has it. transformers adds them at the image tokens alone, a choice of
rows that would fix their number in a graph; here they are zeros at words and are added everywhere.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from transformers import PreTrainedModel

from guardbake.vlm.catalog import Family


def deepstack_levels(model: PreTrainedModel, family: Family) -> int:
    """How many of the first decoder layers get image features; 0 in most families."""
    if not family.deepstack:
        return 0
    tower: Any = model.get_submodule(family.vision)
    return len(tower.deepstack_visual_indexes)


@contextlib.contextmanager
def added_everywhere(decoder: Any, levels: int) -> Iterator[None]:
    """Let the text model take its levels [batch, seq, d] for the length of the block."""
    if levels:
        decoder._deepstack_process = _add
    try:
        yield
    finally:
        if levels:
            del decoder._deepstack_process  # the class's own is seen again


def _add(hidden: torch.Tensor, _places: object, level: torch.Tensor) -> torch.Tensor:
    return hidden + level
