"""Mean effects with bootstrap intervals over prompts, seeded."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt

from guardbake.errors import MalformedError

LOW, HIGH = 2.5, 97.5  # percent: a 95 % interval

Numbers = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Effect:
    """A mean over `prompts` prompts and its 95 % percentile bootstrap interval (Efron 1979)."""

    value: float
    low: float
    high: float
    prompts: int

    def to_json(self) -> dict[str, float | int]:
        return asdict(self)


def bootstrap(
    values: npt.ArrayLike, rounds: int, seed: int, less: npt.ArrayLike | None = None
) -> Effect:
    """The mean of values [N], one a prompt, and the interval of `rounds` redrawn means.

    less [M]: numbers of other prompts, whose mean is taken off; they are redrawn apart. The same
    seed redraws the same prompts, so that curves over layers move together. Raises MalformedError
    for no values and for values that are not finite.
    """
    numbers = _checked(values)
    rng = np.random.default_rng(seed)
    value, means = float(numbers.mean()), _redrawn(numbers, rounds, rng)
    if less is not None:
        others = _checked(less)
        value, means = value - float(others.mean()), means - _redrawn(others, rounds, rng)
    low, high = np.percentile(means, [LOW, HIGH])
    return Effect(value, float(low), float(high), len(numbers))


def _redrawn(numbers: Numbers, rounds: int, rng: np.random.Generator) -> Numbers:
    drawn = rng.integers(0, len(numbers), (rounds, len(numbers)))
    return np.asarray(numbers[drawn].mean(axis=1))


def _checked(values: npt.ArrayLike) -> Numbers:
    numbers = np.asarray(values, dtype=np.float64)
    if numbers.ndim != 1 or not len(numbers) or not np.isfinite(numbers).all():
        raise MalformedError(
            found=f"effects of shape {numbers.shape}, finite: {bool(np.isfinite(numbers).all())}",
            expected="one finite number a prompt",
            where="bootstrap interval",
            remedy="check the model's activations; give at least one prompt",
        )
    return numbers
