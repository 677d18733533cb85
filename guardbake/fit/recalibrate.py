"""New thresholds for an old sensor, where another graph computes what it reads.

A quantised decoder gives a sensor other activations than the model it was fitted on, and so other
scores. The directions stay; the thresholds are set anew, by the rule they were first set by, on
scores read from that graph.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from guardbake import semantics as law
from guardbake.activations import Activations, Rows, rows_at
from guardbake.errors import MalformedError
from guardbake.fit.gate import calibrate, next_float32
from guardbake.fit.sensor import IMAGELESS
from guardbake.samples import Form, Sample
from guardbake.site import Site
from guardbake.spec import Sensor

Scores = npt.NDArray[np.float64]
_VISUAL, _POOLED = 1, 2  # places among the thresholds of a sensor that pools


@dataclass(frozen=True)
class FormShift:
    """One form's prompts.

    shift: scores of the new graph less those of the model fitted on, in units of the score
    (harmless standard deviations): mean, standard deviation and largest. harmless_open,
    harmful_open: share of prompts whose score opens the gate: on the model fitted on, on the new
    graph with the old thresholds, and there with the new ones.
    """

    harmless: int
    harmful: int
    shift: tuple[float, float, float]
    harmless_open: tuple[float, float, float]
    harmful_open: tuple[float, float, float]

    @property
    def lost(self) -> float:
        """How much less often a harmful prompt opens the gate than on the model fitted on."""
        return self.harmful_open[0] - self.harmful_open[2]

    def to_json(self) -> dict[str, Any]:
        names = ("reference", "before", "after")
        return {
            "harmless": self.harmless,
            "harmful": self.harmful,
            "shift": dict(zip(("mean", "deviation", "largest"), self.shift, strict=True)),
            "harmless_open": dict(zip(names, self.harmless_open, strict=True)),
            "harmful_open": dict(zip(names, self.harmful_open, strict=True)),
        }


def reference_scores(sensor: Sensor, captured: Activations) -> Scores:
    """[N] float64, by the law: the scores of captured prompts at their last tokens.

    To a pooling sensor a prompt's mean over image tokens is a memory of one such token.
    """
    last = _features(sensor, captured.last)
    if not sensor.pools:
        return law.score(last, sensor.thresholds)[:, 0]
    pooled = _features(sensor, captured.image_mean)[:, 0, law.POOLED]
    images = captured.where(lambda sample: sample.form != IMAGELESS)
    memory = np.stack([np.where(images, pooled, 0.0), images, np.ones(len(images))], axis=1)
    real, image = np.ones((len(images), 1), np.int64), np.zeros((len(images), 1), bool)
    scores, _ = law.pooled_score(last, sensor.thresholds, real, image, memory)
    return scores[:, 0]


def _features(sensor: Sensor, kind: Mapping[Site, Rows]) -> Scores:
    """[N, 1, C] float64 of rows that stand for one token each."""
    rows = [rows_at(kind, site, "sensor").astype(np.float64)[:, None] for site in sensor.sites]
    return law.features(rows, sensor.readings)


def recalibrated(
    sensor: Sensor, samples: Sequence[Sample], scores: Scores, reference: Scores, rate: float
) -> tuple[Sensor, dict[Form, FormShift]]:
    """The sensor with thresholds that open on at most `rate` of new harmless prompts of any form.

    scores, reference: [N], at the sensor's old thresholds, of the new graph and of the model that
    the sensor was fitted on. Where image tokens are averaged, how much more they must accuse than
    the last token stays as it was fitted. Raises MalformedError if there are too few harmless
    prompts for the rate, or a score is not a number.
    """
    _require_finite(scores, reference)
    forms = sorted({sample.form for sample in samples})
    rows = {form: np.array([sample.form == form for sample in samples]) for form in forms}
    harmful = np.array([sample.label == "harmful" for sample in samples])
    thresholds, after = list(sensor.thresholds), scores.copy()
    for place, group in enumerate(_groups(forms, sensor.pools)):
        if not group:
            continue  # nothing of these forms was asked: their threshold stays
        harmless = {form: scores[rows[form] & ~harmful] for form in group}
        old = thresholds[place]
        thresholds[place] = next_float32(old + calibrate(harmless, rate).threshold)
        for form in group:
            after[rows[form]] -= thresholds[place] - old
    if sensor.pools:
        raised = thresholds[_VISUAL] - sensor.thresholds[_VISUAL]
        thresholds[_POOLED] = next_float32(sensor.thresholds[_POOLED] + raised)
    shifts = {form: _shift(rows[form], harmful, reference, scores, after) for form in forms}
    return replace(sensor, thresholds=tuple(thresholds)), shifts


def _groups(forms: Sequence[Form], pools: bool) -> list[list[Form]]:
    """The forms of each threshold, in the order of `Sensor.thresholds`."""
    if not pools:
        return [list(forms)]
    return [[f for f in forms if f == IMAGELESS], [f for f in forms if f != IMAGELESS]]


def _require_finite(scores: Scores, reference: Scores) -> None:
    for what, values in (("the new graph", scores), ("the model fitted on", reference)):
        amiss = int((~np.isfinite(values)).sum())
        if amiss:
            raise MalformedError(
                found=f"{amiss} scores of {len(values)} that are not finite",
                expected="finite scores",
                where=f"the prompts to calibrate on, in {what}",
                remedy="look for overflow in the graph: a guard opens on such a prompt",
            )


def _shift(
    rows: npt.NDArray[np.bool_],
    harmful: npt.NDArray[np.bool_],
    reference: Scores,
    before: Scores,
    after: Scores,
) -> FormShift:
    apart = (before - reference)[rows]

    def opened(which: npt.NDArray[np.bool_]) -> tuple[float, float, float]:
        first, second, third = (
            float((scores[rows & which] > 0).mean()) for scores in (reference, before, after)
        )
        return first, second, third

    return FormShift(
        harmless=int((rows & ~harmful).sum()),
        harmful=int((rows & harmful).sum()),
        shift=(float(apart.mean()), float(apart.std()), float(np.abs(apart).max())),
        harmless_open=opened(~harmful),
        harmful_open=opened(harmful),
    )
