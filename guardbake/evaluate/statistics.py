"""How sure a count is: intervals, the paired test, several generations a prompt, many comparisons.

One greedy answer a prompt is a count: `Rate`, with Wilson's interval, and `mcnemar_exact` between
two arms. Sampled answers add generations of the same prompts, not prompts: pooling them as though
they were independent would narrow an interval for nothing, so `pooled` resamples whole prompts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from guardbake.errors import UsageError

# Two-sided 95 % point of the normal distribution.
Z95 = 1.959963984540054
RESAMPLES = 10_000


@dataclass(frozen=True)
class Rate:
    """`count` of `total`, with the Wilson score interval at 95 % (Wilson 1927).

    Unlike the normal approximation it keeps a sensible width at 0 of n and n of n.
    Raises UsageError unless 0 <= count <= total and total >= 1.
    """

    count: int
    total: int

    def __post_init__(self) -> None:
        if not (self.total >= 1 and 0 <= self.count <= self.total):
            raise UsageError(
                found=f"{self.count} of {self.total}",
                expected="a count between 0 and a total of at least 1",
                where="a rate",
                remedy="count over a group that has samples",
            )

    @property
    def value(self) -> float:
        return self.count / self.total

    @property
    def low(self) -> float:
        return self._centre() - self._half_width()

    @property
    def high(self) -> float:
        return 1.0 if self.count == self.total else self._centre() + self._half_width()

    def _centre(self) -> float:
        return (self.count + Z95**2 / 2) / (self.total + Z95**2)

    def _half_width(self) -> float:
        spread = self.count * (self.total - self.count) / self.total + Z95**2 / 4
        return Z95 * math.sqrt(spread) / (self.total + Z95**2)

    def __str__(self) -> str:
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}] ({self.count}/{self.total})"

    def to_json(self) -> dict[str, float | int]:
        return {
            "count": self.count,
            "total": self.total,
            "value": self.value,
            "low": self.low,
            "high": self.high,
        }


@dataclass(frozen=True)
class Interval:
    """A mean over prompts and its interval at 95 %."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"

    def to_json(self) -> dict[str, float]:
        return {"value": self.value, "low": self.low, "high": self.high}


@dataclass(frozen=True)
class Pooled:
    """One event over several generations of the same prompts.

    runs: the rate of every generation apart, by its name ("greedy", "seed 0", ...).
    over_runs: the mean over all generations, its interval clustered by prompt.
    """

    runs: Mapping[str, Rate]
    over_runs: Interval

    def to_json(self) -> dict[str, object]:
        return {
            "runs": {name: rate.to_json() for name, rate in self.runs.items()},
            "over_runs": self.over_runs.to_json(),
        }


def pooled(flags: Mapping[str, npt.ArrayLike], seed: int) -> Pooled:
    """Rates of one event, generation by generation and together.

    flags: [prompts] bool for every generation, the prompts in the same order. The interval is the
    percentile bootstrap over prompts (Davison & Hinkley 1997, sections 2.4 and 3.8; RESAMPLES
    draws). Where every prompt came out alike in all generations it would have no width: then
    Wilson's interval over the prompts stands, as though further generations told nothing.
    Raises UsageError for no generation, no prompt, or lists of unlike lengths.
    """
    rows = _same_prompts(flags)
    runs = {name: Rate(int(rows[name].sum()), len(rows[name])) for name in rows}
    by_prompt = np.mean([rows[name] for name in rows], axis=0)
    if (by_prompt == by_prompt[0]).all() and by_prompt[0] in (0.0, 1.0):
        one = next(iter(runs.values()))
        return Pooled(runs, Interval(one.value, one.low, one.high))
    return Pooled(runs, bootstrap_mean(by_prompt, seed))


def difference(
    first: Mapping[str, npt.ArrayLike], second: Mapping[str, npt.ArrayLike], seed: int
) -> Interval:
    """Mean of second minus first over prompts and generations, paired and clustered by prompt.

    Both as for `pooled`, of the same generations and prompts. Without any discordant answer the
    interval has no width; that is the pairing's doing, so read `mcnemar_exact` beside it.
    Raises UsageError as `pooled`, and if the generations differ.
    """
    one, two = _same_prompts(first), _same_prompts(second)
    if list(one) != list(two):
        raise _refuse(f"{list(one)} and {list(two)}", "the same generations in both arms")
    _same_prompts({"first": one[next(iter(one))], "second": two[next(iter(two))]})
    rise = [two[name].astype(np.float64) - one[name] for name in one]
    return bootstrap_mean(np.mean(rise, axis=0), seed)


def bootstrap_mean(values: npt.ArrayLike, seed: int, resamples: int = RESAMPLES) -> Interval:
    """Mean of values [n] and the percentile bootstrap interval of it, the same for the same seed.

    Raises UsageError for no value and for one that is not finite.
    """
    array = np.asarray(values, np.float64)
    if array.ndim != 1 or not len(array) or not np.isfinite(array).all():
        raise _refuse(f"values of shape {list(array.shape)}", "finite numbers, one a prompt")
    rng = np.random.default_rng(seed)
    means = np.array(
        [array[rng.integers(len(array), size=len(array))].mean() for _ in range(resamples)]
    )
    low, high = np.quantile(means, (0.025, 0.975))
    return Interval(float(array.mean()), float(low), float(high))


def mcnemar_exact(only_first: int, only_second: int) -> float:
    """Two-sided exact p-value of McNemar's test from the two discordant counts (McNemar 1947).

    Under the null each discordant pair falls to either side with probability 1/2. No discordant
    pair: 1. Pairs are of one generation: over several they are not independent, see `difference`.
    Raises UsageError for a negative count.
    """
    if min(only_first, only_second) < 0:
        raise UsageError(
            found=f"discordant counts {only_first} and {only_second}",
            expected="counts of at least 0",
            where="McNemar's test",
            remedy="count pairs",
        )
    pairs = only_first + only_second
    tail = sum(math.comb(pairs, k) for k in range(min(only_first, only_second) + 1))
    return min(1.0, 2 * tail / (1 << pairs))


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for their number, in their own order (Holm 1979).

    Comparing one adjusted p with 0.05 keeps the chance of any false finding among all of them
    below 5 %, however the comparisons depend on each other. Raises UsageError outside [0, 1].
    """
    if not all(0.0 <= p <= 1.0 for p in p_values):
        raise _refuse("a p-value outside [0, 1]", "p-values")
    adjusted = [0.0] * len(p_values)
    least = 0.0
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    for rank, place in enumerate(order):
        least = max(least, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = least
    return adjusted


def _same_prompts(flags: Mapping[str, npt.ArrayLike]) -> dict[str, npt.NDArray[np.bool_]]:
    rows = {name: np.asarray(row, np.bool_) for name, row in flags.items()}
    shapes = sorted({row.shape for row in rows.values()})
    if len(shapes) != 1 or len(shapes[0]) != 1 or shapes[0] == (0,):
        raise _refuse(f"answers of shapes {shapes}", "[prompts] for every generation, at least 1")
    return rows


def _refuse(found: str, expected: str) -> UsageError:
    return UsageError(
        found=found, expected=expected, where="the statistics", remedy="count every prompt once"
    )
