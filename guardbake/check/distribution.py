"""Teacher-forced next-token distributions of two runs: KL divergence, the likeliest tokens, and how
much larger a difference is than the reference's own rounding.

Both runs are fed the reference's tokens, so that position i of both sees the same text. Computed in
float64 from logits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from guardbake.check.comparison import (
    Budget,
    Comparison,
    Difference,
    Runs,
    largest,
    step_mask,
)
from guardbake.plugins import Trace

Array = npt.NDArray[Any]


def divergence(budget: Budget, runs: Sequence[Runs]) -> Comparison:
    """The largest KL(reference || candidate) of a new token, in nats."""

    def differences() -> Iterator[Difference]:
        for name, ref, got, rows in runs:
            mask = step_mask(ref) & rows[:, None]
            yield name, mask, kl(ref.step_logits, got.step_logits)

    return largest("kl", "KL divergence, nats", budget, differences())


def kl(p_logits: Array, q_logits: Array) -> Array:
    """KL(p || q) over the last axis, float64; infinite where a logit is not finite.

    >>> kl(np.array([[0.0, 0.0]]), np.array([[1.0, 1.0]]))      # a shift changes no probability
    array([0.])
    """
    if p_logits.shape != q_logits.shape:
        return np.full(p_logits.shape[:-1], np.inf)
    finite = np.isfinite(p_logits).all(axis=-1) & np.isfinite(q_logits).all(axis=-1)
    zeroed = (np.where(np.expand_dims(finite, -1), x, 0) for x in (p_logits, q_logits))
    log_p, log_q = (_log_softmax(x.astype(np.float64)) for x in zeroed)
    nats = (np.exp(log_p) * (log_p - log_q)).sum(axis=-1)
    return np.asarray(np.where(finite, np.maximum(nats, 0.0), np.inf))


def _log_softmax(x: Array) -> Array:
    away = x - x.max(axis=-1, keepdims=True)
    return np.asarray(away - np.log(np.exp(away).sum(axis=-1, keepdims=True)))


def likeliest(gate: str, count: int, budget: Budget, runs: Sequence[Runs]) -> Comparison:
    """The share of the reference's `count` likeliest tokens that are not the candidate's, too."""
    missing, compared, where = 0, 0, "nowhere"
    for name, ref, got, rows in runs:
        mask = step_mask(ref) & rows[:, None]
        lost = _lost(ref.step_logits, got.step_logits, count)
        compared += count * int(mask.sum())
        missing += int(lost[mask].sum())
        if where == "nowhere" and lost[mask].any():
            row, step = np.argwhere((lost > 0) & mask)[0]
            where = f"{name}, row {row}, step {step}"
    share = missing / compared if compared else 0.0
    quantity = f"top-{count} tokens that differ, share"
    return Comparison(gate, quantity, share, budget.limit, budget.source, compared, where)


def _lost(p: Array, q: Array, count: int) -> Array:
    """[B, n] int: how many of p's likeliest are not q's; all of them where q is not finite."""
    if p.shape != q.shape:
        return np.full(p.shape[:-1], count)
    wanted, given = (np.argsort(-x, axis=-1, kind="stable")[..., :count] for x in (p, q))
    lost = count - (wanted[..., :, None] == given[..., None, :]).any(axis=-1).sum(axis=-1)
    return np.asarray(np.where(np.isfinite(q).all(axis=-1), lost, count))


def rms(ref: Trace, got: Trace, rows: Array) -> float:
    """Root mean square difference of the new tokens' logits; inf if one is not finite."""
    if ref.step_logits.shape != got.step_logits.shape:
        return float("inf")
    mask = step_mask(ref) & rows[:, None]
    apart = ref.step_logits.astype(np.float64)[mask] - got.step_logits.astype(np.float64)[mask]
    if not apart.size or not np.isfinite(apart).all():
        return float("inf")
    return float(np.sqrt(np.square(apart).mean()))


def against_noise(budget: Budget, runs: Sequence[Runs], floor: float) -> Comparison:
    """The candidate's distance from the reference, as a multiple of `floor`.

    floor: the same distance of the reference computing in the candidate's precision. A candidate
    may round otherwise; it may not be much further off than rounding takes the reference itself.
    """
    compared = sum(int((step_mask(ref) & rows[:, None]).sum()) for _, ref, _, rows in runs)
    worst, where = 0.0, "nowhere"
    for name, ref, got, rows in runs:
        if rows.any():
            times = rms(ref, got, rows) / floor if floor > 0 else float("inf")
            worst, where = max((worst, where), (times, name))
    quantity = "logits, multiples of the reference's own noise"
    return Comparison("noise", quantity, worst, budget.limit, budget.source, compared, where)
