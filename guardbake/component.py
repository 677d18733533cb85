"""What diagnosis looks at inside the decoder and what it takes out; see `diagnose.ablation`.

A guard reads and edits sites, never these.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

ComponentName = Literal["attention_output", "ffn_output", "residual"]
NAMES: tuple[ComponentName, ...] = get_args(ComponentName)
Part = Literal["layer", "attention", "ffn", "pair"]
Kind = Literal["skip", "zero", "mean", "resample"]
PARTS: tuple[Part, ...] = get_args(Part)


@dataclass(frozen=True)
class Component:
    """One [B, T, d] tensor of decoder layer `layer` (counted from 0).

    attention_output, ffn_output: what the layer's two halves add to the residual; residual: the
    layer's output. The latter two carry the names of a site's boundaries and are the same tensors.
    """

    layer: int
    name: ComponentName

    def __str__(self) -> str:
        return f"layers.{self.layer}.{self.name}"

    @property
    def depth(self) -> int:
        """Order in which data passes the components: attention, FFN, residual."""
        return 3 * self.layer + NAMES.index(self.name)
