"""Which layers to edit: one stated rule over what ablations do and over what separates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from guardbake.diagnose.effects import Effect
from guardbake.errors import MalformedError

RULE = (
    "A layer is admissible if ablating its FFN lowers the refusal score of harmful prompts more "
    "than that of harmless ones, with a 95 % interval above zero, mean over the forms (cause), and "
    "leaves the model whole: on harmless prompts the first answer token's distribution moves by at "
    "most the declared divergence, mean over prompts, in the form where it moves most. Admissible "
    "layers are ranked by cause and by the Mahalanobis distance between harmful and harmless FFN "
    "outputs at the prompt's last token, smallest over the forms (separability). The smallest sums "
    "of both ranks are chosen; ties: the larger cause, then the earlier layer."
)


@dataclass(frozen=True)
class LayerEvidence:
    """divergence: in nats. ranks: by cause and by separability among the admissible layers, from 1;
    None for the others."""

    layer: int
    cause: Effect
    divergence: float
    separability: float
    ranks: tuple[int, int] | None

    def to_json(self) -> dict[str, Any]:
        return {
            "layer": self.layer,
            "cause": self.cause.to_json(),
            "divergence": self.divergence,
            "separability": self.separability,
            "ranks": None if self.ranks is None else list(self.ranks),
        }


@dataclass(frozen=True)
class LayerChoice:
    """layers: the chosen ones, in order. evidence: of every layer, in order."""

    layers: tuple[int, ...]
    evidence: tuple[LayerEvidence, ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "rule": RULE,
            "layers": list(self.layers),
            "evidence": [one.to_json() for one in self.evidence],
        }


def choose_layers(
    causes: Sequence[Effect],
    divergence: Sequence[float],
    separability: Sequence[float],
    most_divergence: float,
    count: int,
) -> LayerChoice:
    """At most `count` layers by RULE, from one number of each kind a layer, in order of layers.

    None if no layer is admissible: the curves are worth having all the same. Raises MalformedError
    for curves of unlike length or numbers that are not finite.
    """
    curves = np.array([len(causes), len(divergence), len(separability)])
    if (curves != len(causes)).any() or not np.isfinite([*divergence, *separability]).all():
        raise MalformedError(
            found=f"curves of {curves.tolist()} layers, or numbers that are not finite",
            expected="one finite number a layer, of each kind",
            where="the choice of layers",
            remedy="diagnose again",
        )
    whole = [layer for layer, moved in enumerate(divergence) if moved <= most_divergence]
    admissible = [layer for layer in whole if causes[layer].low > 0]
    by_cause = _ranks([causes[layer].value for layer in admissible])
    by_distance = _ranks([separability[layer] for layer in admissible])
    ranks = dict(zip(admissible, zip(by_cause, by_distance, strict=True), strict=True))
    order = sorted(admissible, key=lambda n: (sum(ranks[n]), -causes[n].value, n))
    evidence = tuple(
        LayerEvidence(layer, cause, float(moved), float(distance), ranks.get(layer))
        for layer, (cause, moved, distance) in enumerate(
            zip(causes, divergence, separability, strict=True)
        )
    )
    return LayerChoice(tuple(sorted(order[:count])), evidence)


def _ranks(values: Sequence[float]) -> list[int]:
    """From 1 for the largest; equal values share the smaller rank."""
    return [1 + sum(other > value for other in values) for value in values]
