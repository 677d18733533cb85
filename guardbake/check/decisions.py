"""Gate decisions of two runs: where they differ, how near the threshold they were, and whether a
gate's answers and its latched state agree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from guardbake.check.comparison import Comparison, token_mask
from guardbake.plugins import Trace
from guardbake.semantics import OPEN, own_state

Array = npt.NDArray[Any]
EDGES = tuple(10.0**power for power in range(-6, 4))
"""Of the margin histogram: |score| below the first, between two of them, above the last."""


@dataclass(frozen=True, eq=False)
class Flips:
    """Of one batch. G gates.

    same: [B] bool, rows whose gates all decided alike. judged: [B, G] bool, gates up to and with a
    row's first flip, which saw the same stream. inside, outside: flips within and beyond the margin
    band. incoherent: gates whose answers and whose bit of the state do not say the same. margins:
    [B, G], the smallest |score| of the reference at tokens that decide.
    """

    same: Array
    judged: Array
    inside: int
    outside: int
    incoherent: int
    decisions: int
    margins: Array


def flips(ref: Trace, got: Trace, band: float) -> Flips:
    """Compare each gate's decisions token by token; a row counts once, at its first flip."""
    assert ref.guard_open is not None
    assert ref.guard_score is not None
    seen = token_mask(ref)
    deciding = _deciding(ref, seen)[..., None]
    margin = np.where(deciding, np.abs(ref.guard_score), np.inf).min(axis=1)
    if got.guard_open is None or got.guard_open.shape != ref.guard_open.shape:
        none = np.zeros(len(margin), bool)
        every = np.ones(margin.shape, bool)
        return Flips(none, every, 0, every.size, every.size, every.size, margin)
    differs = ((ref.guard_open != got.guard_open) & seen[..., None]).any(axis=1)
    judged = np.cumsum(differs, axis=1) - differs == 0
    flipped = differs & judged
    inside = flipped & (margin <= band)
    return Flips(
        ~differs.any(axis=1),
        judged,
        int(inside.sum()),
        int((flipped & ~inside).sum()),
        0 if ref.guard_state is None else _incoherent(got, seen),
        int(judged.sum()),
        margin,
    )


def _incoherent(trace: Trace, seen: Array) -> int:
    assert trace.guard_open is not None
    opened = (trace.guard_open & seen[..., None]).any(axis=1)
    if trace.guard_state is None:
        return int(opened.size)
    gates = range(opened.shape[1])
    said = [own_state(trace.guard_state, gate) == OPEN for gate in gates]
    return int((opened != np.stack(said, axis=1)).sum())


def _deciding(trace: Trace, seen: Array) -> Array:
    """[B, T + n - 1] bool: tokens whose score decides: the last of the prompt if latched."""
    if trace.guard_state is None:
        return seen
    deciding = np.zeros_like(seen)
    deciding[:, trace.valid.shape[1] - 1] = True
    return deciding


def decided_alike(found: Sequence[Flips]) -> list[Comparison]:
    """Flips beyond the band, and states unlike the answers: none of either is allowed."""
    compared = sum(f.decisions for f in found)

    def count(quantity: str, number: int) -> Comparison:
        source = "decisions are discrete"
        return Comparison("decisions", quantity, number, None, source, compared, "see margins")

    return [
        count("gate decisions outside the band", sum(f.outside for f in found)),
        count("guard_open unlike guard_state", sum(f.incoherent for f in found)),
    ]


def margins(found: Sequence[Flips]) -> dict[str, float]:
    """Of |score| at tokens that decide: smallest, 5 % and median; empty without a gate."""
    if not found:
        return {}
    every = _every(found)
    names = {"smallest": 0.0, "5 %": 0.05, "median": 0.5}
    return {name: float(np.quantile(every, share)) for name, share in names.items()}


def histogram(found: Sequence[Flips]) -> list[dict[str, float | int | None]]:
    """How many margins lie from `above` (0 for the first) up to `below` (None for the last)."""
    if not found:
        return []
    edges = np.array([0.0, *EDGES, np.inf])
    counts = np.histogram(_every(found), edges)[0]
    tops: list[float | None] = [*EDGES, None]
    return [
        {"above": float(low), "below": top, "decisions": int(count)}
        for low, top, count in zip(edges, tops, counts, strict=False)
    ]


def _every(found: Sequence[Flips]) -> Array:
    return np.concatenate([f.margins.ravel() for f in found])
