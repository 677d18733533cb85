"""What a defence costs harmless answers: perplexity and divergence against the undefended model.

Both are measured on the undefended model's own greedy answers, forced upon either model, and on
real tokens only. Intervals resample whole prompts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from guardbake.evaluate.statistics import RESAMPLES, Interval
from guardbake.vlm.behaviour import Drift

SEED = 0


@dataclass(frozen=True)
class Cost:
    """One arm on the harmless prompts of one family.

    perplexity: of the undefended model's answers under the arm; ratio: over the undefended model's
    own. divergence: KL(undefended || arm), nats a token.
    """

    arm: str
    family: str
    prompts: int
    tokens: int
    perplexity: float
    ratio: Interval
    divergence: Interval

    def to_json(self) -> dict[str, Any]:
        return {
            "arm": self.arm,
            "family": self.family,
            "prompts": self.prompts,
            "tokens": self.tokens,
            "perplexity": self.perplexity,
            "ratio": self.ratio.to_json(),
            "divergence": self.divergence.to_json(),
        }


def cost(arm: str, family: str, drift: Drift, undefended: Drift) -> Cost:
    """drift, undefended: the same prompts and the same forced tokens."""
    rng = np.random.default_rng(SEED)
    rows = rng.integers(len(drift.tokens), size=(RESAMPLES, len(drift.tokens)))

    def a_token(values: np.ndarray) -> tuple[float, np.ndarray]:
        means = values[rows].sum(1) / drift.tokens[rows].sum(1)
        return float(values.sum() / drift.tokens.sum()), np.quantile(means, (0.025, 0.975))

    rise, rises = a_token(drift.surprise - undefended.surprise)
    moved, moves = a_token(drift.divergence)
    return Cost(
        arm,
        family,
        len(drift.tokens),
        int(drift.tokens.sum()),
        float(np.exp(drift.surprise.sum() / drift.tokens.sum())),
        Interval(float(np.exp(rise)), *np.exp(rises).tolist()),
        Interval(moved, *moves.tolist()),
    )
