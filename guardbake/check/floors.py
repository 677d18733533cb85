"""What a candidate in half precision is held to: multiples of what that precision does to the
reference itself, measured in the run that made the reference's answers.

A recipe declares its budgets for float32, where the noise is that of another summation order. In
half precision every number carries a rounding of its own, eight thousand times larger, and how much
of it reaches the logits depends on the model. The reference computing in that precision shows it:
this is a floor. A candidate may round otherwise, and so be off by as many floors as the recipe's
budget `noise` allows, which names the source for that number. The law of the guard's own nodes
keeps its budget: they compute in float32 whatever the model does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from guardbake.check.comparison import Budget, Budgets
from guardbake.check.decisions import flips
from guardbake.check.distribution import rms
from guardbake.check.parity import Pair, compare
from guardbake.errors import UnsupportedError
from guardbake.plugins import Trace

Array = npt.NDArray[Any]
Floors = Mapping[str, float]
"""By field of `Budgets`: how far off the reference is when it computes in one precision."""

_FIELDS: Final[Mapping[str, str]] = {
    "logits": "logits",
    "score": "score",
    "ffn output": "ffn_output",
    "cosine": "cosine",
    "norm ratio": "norm_ratio",
    "kl": "kl",
    "top-1": "top1",
    "top-5": "top5",
}
"""Gates that compare with the reference, and the budget of each."""
_SQUARED: Final = ("cosine", "kl")  # half the square of an angle, of an error of the logits
_SHARES: Final = ("top1", "top5")
_TOLD_APART: Final = 10.0


@dataclass(frozen=True)
class Standard:
    """declared: the recipe's budgets, for float32. noise: the reference's own root mean square
    distance of logits in float32. floors: by half precision, of those that were measured."""

    declared: Budgets
    noise: float
    floors: Mapping[str, Floors]

    def budgets(self, number: str) -> Budgets:
        """What a candidate that computes in `number` is held to.

        Raises UnsupportedError if that precision was not measured, or overflows.
        """
        if number == "float32":
            return self.declared
        return widened(self.declared, self._floors(number), number)

    def noise_in(self, number: str) -> float:
        """The reference's own root mean square distance in that precision; raises likewise."""
        return self.noise if number == "float32" else self._floors(number)["noise"]

    def _floors(self, number: str) -> Floors:
        if number not in self.floors or self.declared.noise is None:
            measured = ", ".join(["float32", *sorted(self.floors)])
            raise UnsupportedError(
                found=f"a decoder that computes in {number}",
                expected=f"one in {measured}, for which the bundle knows the reference's own noise",
                where="parity with the golden runs",
                remedy=f'bake with number = "{number}" in the recipe\'s section export or engine',
            )
        floors = self.floors[number]
        if not np.isfinite(list(floors.values())).all():
            raise UnsupportedError(
                found=f"a model that overflows in {number}, or whose gates it flips everywhere",
                expected="finite numbers of the reference itself",
                where="parity with the PyTorch reference",
                remedy="compute in float32, or in bfloat16, which has its range",
            )
        return floors


def measure_floors(runs: Sequence[tuple[str, Trace, Trace]]) -> dict[str, float]:
    """How far the reference in half precision is from itself, at the most of all runs.

    runs: name, the reference's trace, and its trace in half precision, fed the same tokens. A share
    is at least that of one token of the first run, with which a bundle is checked again.
    """
    unjudged = Budget(float("inf"), "measured, not judged")
    every: dict[str, Any] = dict.fromkeys((*_FIELDS.values(), "margin_band"), unjudged)
    found: dict[str, float] = {}
    for name, truth, rounded in runs:
        pair = Pair(name, truth, rounded, None, None)
        report = compare([pair], Budgets(**every), truth.guard_score is not None)
        for row in (row for row in report.comparisons if row.gate in _FIELDS):
            field = _FIELDS[row.gate]
            one = 1 / row.compared if field in _SHARES and row.compared else 0.0
            found[field] = max(found.setdefault(field, one), row.worst)
        found["noise"] = max(found.get("noise", 0.0), rms(truth, rounded, _alike(truth, rounded)))
    return found


def _alike(truth: Trace, rounded: Trace) -> Array:
    """[B] bool: rows whose gates half precision does not flip; behind a flip is another text."""
    if truth.guard_open is None:
        return np.ones(len(truth.tokens), bool)
    return flips(truth, rounded, float("inf")).same


def widened(declared: Budgets, floors: Floors, number: str) -> Budgets:
    """The declared budgets, each as many floors wide as `declared.noise` allows, if that is more.

    Of an error so many times as large, what grows with its square grows by the square of the times.
    Gates may flip where their score may err; ways of feeding differ by two errors of the logits, as
    may two logits that a greedy choice is between.
    """
    assert declared.noise is not None
    times, why = declared.noise.limit, declared.noise.source
    wide: dict[str, Any] = {}
    for name, floor in sorted(floors.items()):
        old: Budget | None = getattr(declared, name)
        limit = times ** (2 if name in _SQUARED else 1) * floor
        if name == "noise" or old is None or limit <= old.limit:
            continue
        squared = f", {times:g} squared," if name in _SQUARED else ""
        said = f"{limit / floor:g}{squared} times the {floor:.3g} that {number} does to"
        wide[name] = Budget(limit, f"{said} the reference itself; {why}")
    found = replace(declared, **wide)
    twice = 2 * found.logits.limit
    band = Budget(found.score.limit, "the score's budget: within it rounding may decide")
    cache = Budget(twice, "twice the logits' budget: either way of feeding may be off by it")
    return replace(
        found,
        margin_band=max(found.margin_band, band, key=lambda budget: budget.limit),
        cache=None if found.cache is None else max(found.cache, cache, key=lambda b: b.limit),
        ties=twice,
        told_apart=_TOLD_APART,
    )
