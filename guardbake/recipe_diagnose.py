"""The recipe's section [diagnose]: what is traced, and how many layers are chosen."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from guardbake.component import Kind, Part
from guardbake.section import Count, Positive, Section


class DiagnoseSection(Section):
    """Causal tracing and separability, both on the fit split, and the layers that they choose.

    prompts: harmful prompts traced in each form, and as many harmless ones; donors: other harmless
    prompts, which are put in or averaged. parts, kinds: what is ablated and how (see
    `diagnose.ablation`); the kind `decide` is what the choice of layers goes by. generate: kinds
    under which answers of at most `tokens` tokens are generated as well, on the harmful prompts.
    opening: tokens of an answer that the refusal score reads. divergence: nats by which an ablation
    may move harmless answers before it says nothing of refusals. rounds: of the bootstrap. layers:
    how many are chosen.
    """

    prompts: Annotated[int, Field(ge=2)] = 24
    donors: Annotated[int, Field(ge=2)] = 24
    parts: tuple[Part, ...] = Field(default=("layer", "attention", "ffn", "pair"), strict=False)
    kinds: tuple[Kind, ...] = Field(default=("skip", "mean", "resample"), strict=False)
    decide: Kind = "resample"
    divergence: Positive = 1.0
    generate: tuple[Kind, ...] = Field(default=(), strict=False)
    tokens: Annotated[int, Field(ge=8)] = 16
    opening: Count = 2
    rounds: Annotated[int, Field(ge=100)] = 2000
    layers: Count = 3
    seed: Annotated[int, Field(ge=0)] = 0

    @model_validator(mode="after")
    def _decides_by_what_is_traced(self) -> DiagnoseSection:
        if "ffn" not in self.parts or self.decide not in self.kinds:
            raise ValueError("the choice needs ffn among parts, and decide among kinds")
        if not set(self.generate) <= set(self.kinds):
            raise ValueError("generate must name kinds that are traced")
        return self
