"""The gate: one direction, and a threshold calibrated for a stated false-positive rate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from guardbake.errors import MalformedError
from guardbake.samples import Form

Scores = npt.NDArray[np.float64]
RATES = (0.01, 0.02, 0.05)


@dataclass(frozen=True)
class Calibration:
    """threshold: the largest of the forms' own; open_rate[form]: share of harmless scores above."""

    threshold: float
    open_rate: Mapping[Form, float]


def upper_quantile(harmless: npt.ArrayLike, rate: float) -> float:
    """The smallest threshold that at most `rate` of exchangeable new harmless scores will exceed.

    The split-conformal quantile: the ceil((n + 1)(1 - rate))-th smallest of n scores. Raises
    MalformedError if n is too small to promise that rate.
    """
    scores = np.sort(np.asarray(harmless, dtype=np.float64))
    # rounded first: (149 + 1) * (1 - 0.18) is a little more than 123 in floating point
    index = int(np.ceil(round((len(scores) + 1) * (1 - rate), 9)))
    if index > len(scores):
        raise MalformedError(
            found=f"{len(scores)} harmless samples",
            expected=f"at least {int(np.ceil(round(1 / rate, 9))) - 1} for a rate of {rate}",
            where="calibrating the gate",
            remedy="give more harmless samples of this form or allow a higher rate",
        )
    return float(scores[index - 1])


def next_float32(value: float) -> float:
    """The smallest float32 that is not below `value`.

    The last digits of a float64 are those of one number of threads, and no guard hangs on them.

    >>> next_float32(0.5), next_float32(0.5 - 1e-12), next_float32(0.7) > 0.7
    (0.5, 0.5, True)
    """
    near = np.float32(value)
    return float(near) if float(near) >= value else float(np.nextafter(near, np.float32(np.inf)))


def calibrate(harmless: Mapping[Form, npt.ArrayLike], rate: float) -> Calibration:
    """One threshold that keeps the promised rate on every form.

    A threshold from text alone is wrong on images, in a direction that depends on the layer, so
    each form is calibrated on harmless prompts of its own and the strictest threshold is taken, as
    the next float32: the precision that a graph holds it in.
    """
    threshold = next_float32(max(upper_quantile(scores, rate) for scores in harmless.values()))
    rates = {f: float((np.asarray(s) > threshold).mean()) for f, s in harmless.items()}
    return Calibration(threshold, rates)


def detection_at(harmful: npt.ArrayLike, harmless: npt.ArrayLike) -> dict[str, float]:
    """Share of harmful scores above the threshold that 1 %, 2 % and 5 % of these harmless pass.

    The threshold is taken on the scores that are judged: a figure to compare sensors by, not a
    promise. With too few harmless scores for a rate it is stricter: none of them passes.
    """
    bad, good = np.asarray(harmful, dtype=np.float64), np.sort(np.asarray(harmless))[::-1]
    found = {}
    for rate in RATES:
        found[f"{rate:g}"] = float((bad > good[int(np.floor(rate * len(good)))]).mean())
    return found
