"""One quantity of two runs held against its budget: what a comparison is, and how a worst is found.

No tolerance is a default: every budget is declared and names its source. A value that is not finite
fails whatever the budget; a comparison of nothing is a failure, not a pass.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from guardbake.plugins import Trace

Array = npt.NDArray[Any]
Difference = tuple[str, Array, Array]
"""Name of a batch, which entries count [B, n] bool, and how far each is apart [B, n]."""
Runs = tuple[str, Trace, Trace, Array]
"""Name of a batch, the reference, the candidate, and the rows [B] bool that decided alike."""


@dataclass(frozen=True)
class Budget:
    """limit: the largest allowed value; source: why this one."""

    limit: float
    source: str


@dataclass(frozen=True)
class Budgets:
    """By gate, see `check.levels`; None: the recipe declares none, so the gate is not asked.

    score, ffn_output, logits, cache: largest absolute difference. margin_band: gate decisions may
    differ only where the reference's |score| is within it. law: largest share of what rounding
    explains. cosine: largest 1 - cosine. norm_ratio: largest |ratio - 1|. kl: nats a token. top1,
    top5: largest share. noise: multiples of the reference's own noise.

    ties: a greedy token may be another one where the reference's logits of the two are as near.
    told_apart: guarded and unguarded must differ by this many budgets of the logits, or the test is
    blind: a thousandth of what the guard does would be seen, or of half precision a tenth.
    """

    score: Budget
    ffn_output: Budget
    logits: Budget
    margin_band: Budget
    law: Budget | None = None
    cosine: Budget | None = None
    norm_ratio: Budget | None = None
    kl: Budget | None = None
    top1: Budget | None = None
    top5: Budget | None = None
    noise: Budget | None = None
    cache: Budget | None = None
    ties: float = 0.0
    told_apart: float = 1e3


@dataclass(frozen=True)
class Comparison:
    """One quantity of a gate. worst: the largest difference, the tolerance that would pass.

    limit None: a count or a share, passed iff `worst` is 0. compared: numbers looked at.
    """

    gate: str
    quantity: str
    worst: float
    limit: float | None
    source: str
    compared: int
    where: str

    @property
    def passed(self) -> bool:
        bound = 0.0 if self.limit is None else self.limit
        return self.compared > 0 and bool(np.isfinite(self.worst)) and self.worst <= bound


def largest(
    gate: str, quantity: str, budget: Budget, differences: Iterable[Difference]
) -> Comparison:
    """The worst entry of all batches, and where it stands."""
    worst, where, compared = 0.0, "nowhere", 0
    for name, mask, apart in differences:
        compared += int(mask.sum())
        masked = np.where(mask, np.where(np.isfinite(apart), apart, np.inf), 0.0)
        place = np.unravel_index(masked.argmax(), masked.shape)
        if masked[place] >= worst and mask.any():
            worst, where = float(masked[place]), f"{name}, row {place[0]}, token {place[1]}"
    return Comparison(gate, quantity, worst, budget.limit, budget.source, compared, where)


def gap(a: Array, b: Array) -> Array:
    """Largest |a - b| over the last axis; a value that is not finite is infinitely far."""
    if a.shape != b.shape:
        return np.full(a.shape[:-1], np.inf)
    wide = np.abs(a.astype(np.float64) - b.astype(np.float64))
    return np.asarray(np.where(np.isfinite(wide), wide, np.inf).max(axis=-1))


def token_mask(trace: Trace) -> Array:
    """[B, T + n - 1] bool: real tokens fed, up to each row's end."""
    new = np.arange(trace.tokens.shape[1] - 1)[None] < trace.lengths[:, None] - 1
    return np.concatenate([trace.valid, new], axis=1)


def step_mask(trace: Trace) -> Array:
    """[B, n] bool: new tokens up to and with each row's end."""
    return np.asarray(np.arange(trace.tokens.shape[1])[None] < trace.lengths[:, None])
