"""How alike two runs' activations are at the guard's sites: by direction and by length."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from guardbake.check.comparison import (
    Budgets,
    Comparison,
    Difference,
    Runs,
    largest,
    token_mask,
)
from guardbake.plugins import EDITED, REACHED

Array = npt.NDArray[Any]
Measure = Callable[[Array, Array], Array]


def alike(budgets: Budgets, runs: Sequence[Runs]) -> list[Comparison]:
    """1 - cosine and |norm ratio - 1| of every tap of both runs, before the guard and after it."""
    if not all(got.taps for _, _, got, _ in runs):
        return []
    found = []
    for gate, quantity, budget, measure in (
        ("cosine", "1 - cosine", budgets.cosine, turned),
        ("norm ratio", "|norm ratio - 1|", budgets.norm_ratio, stretched),
    ):
        if budget is None:
            continue
        for prefix, when in ((REACHED, "before the guard"), (EDITED, "after it")):
            differences = _differences(runs, prefix, measure)
            found.append(largest(gate, f"{quantity}, {when}", budget, differences))
    return found


def _differences(runs: Sequence[Runs], prefix: str, measure: Measure) -> Iterator[Difference]:
    for name, ref, got, rows in runs:
        for tap in sorted(tap for tap in ref.taps if tap.startswith(prefix)):
            site = tap.removeprefix(prefix)
            mask = token_mask(ref) & rows[:, None]
            other = got.taps.get(tap)
            far = np.full(mask.shape, np.inf)
            yield f"{name}, {site}", mask, far if other is None else measure(ref.taps[tap], other)


def turned(a: Array, b: Array) -> Array:
    """1 - cosine over the last axis, float64; inf if it has none.

    By the distance of the unit vectors, half of its square: 1 - a.b / (|a||b|) loses all digits
    where the two are nearly one.
    """
    if a.shape != b.shape:
        return np.full(a.shape[:-1], np.inf)
    units = [_unit(x.astype(np.float64)) for x in (a, b)]
    return np.asarray(np.square(units[0] - units[1]).sum(axis=-1) / 2)


def stretched(a: Array, b: Array) -> Array:
    """||b|| / ||a|| - 1 over the last axis, without its sign, float64; inf if a is zero."""
    if a.shape != b.shape:
        return np.full(a.shape[:-1], np.inf)
    old, new = (np.linalg.norm(x.astype(np.float64), axis=-1) for x in (a, b))
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(np.abs(new - old) / old)


def _unit(x: Array) -> Array:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(x / np.linalg.norm(x, axis=-1, keepdims=True))
