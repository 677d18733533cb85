"""Fit the sensor: a shrunken discriminant over several sites, judged by cross-fitted detection.

The rows of the sites are scaled alike and stand side by side; one direction through all of them is
one MatMul a site in the graph. A pooling sensor adds what the image tokens say on average, and has
a threshold of its own for requests with an image (METHODS 8: the sensor does the protecting).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from guardbake.activations import Activations, Rows, rows_at
from guardbake.covariance import Matrix
from guardbake.diagnose.separability import area_under_curve, folds
from guardbake.fit.gate import Calibration, calibrate, detection_at
from guardbake.fit.subspace import discriminant_direction
from guardbake.samples import Form
from guardbake.site import Site
from guardbake.spec import Reading, Sensor

Flags = npt.NDArray[np.bool_]
FOLDS = 5
IMAGELESS: Form = "text"


@dataclass(frozen=True)
class SensorPlan:
    """What is tried. readings: most sites read together. ridges: relative to tr(C)/d. rate: the
    promised false-positive rate. pooling: weights of the image tokens' mean beside the last token,
    both in harmless standard deviations; with any, the sensor has two thresholds, for requests
    without and with an image."""

    sites: Sequence[Site]
    readings: int
    ridges: Sequence[float]
    rate: float
    pooling: Sequence[float] = ()


@dataclass(frozen=True)
class SensorReport:
    """What the choice saw.

    cross_fitted: mean over forms of the detection rate at the promised false-positive rate, on the
    fitting prompts, each judged by a direction fitted without it. pooling: the weight taken.
    detection[form]: harmful scores above the threshold; auc[form]; at[form][rate]: detection at
    other false-positive rates of that form. All three on `held_out`.
    """

    sites: tuple[Site, ...]
    ridge: float
    pooling: float
    cross_fitted: float
    calibrations: tuple[Calibration, ...]
    detection: Mapping[Form, float]
    auc: Mapping[Form, float]
    at: Mapping[Form, Mapping[str, float]]


def fit_sensor(
    fitting: Activations, held_out: Activations, plan: SensorPlan
) -> tuple[Sensor, SensorReport]:
    """Directions from `fitting`, sites, ridge and weight by cross-fitting there, thresholds from
    `held_out`, where the rate is kept on the harmless prompts of each form."""
    groups = _groups(_forms(fitting), bool(plan.pooling))
    everything = np.ones(len(fitting.samples), bool)
    best, sites, ridge = _choose_sites(fitting, plan, groups)
    last = _direction(fitting, fitting.last, sites, ridge, everything)
    weight, pooled = 0.0, None
    if plan.pooling:
        best, weight = _choose_weight(fitting, plan, sites, ridge, groups)
        pooled = _pooled(fitting, sites, ridge, everything).scaled(weight)
    scores = _scores(held_out, last, pooled)
    harmless = held_out.where(lambda s: s.label == "harmless")
    rows = _forms(held_out)
    calibrations = tuple(
        calibrate({form: scores[rows[form] & harmless] for form in group}, plan.rate)
        for group in groups
    )
    sensor = _assembled(last, pooled, [c.threshold for c in calibrations])
    limits = {f: c.threshold for c, group in zip(calibrations, groups, strict=True) for f in group}
    detection = {f: float((scores[rows[f] & ~harmless] > limits[f]).mean()) for f in rows}
    both = {f: (scores[rows[f] & ~harmless], scores[rows[f] & harmless]) for f in rows}
    auc = {f: area_under_curve(bad, good) for f, (bad, good) in both.items()}
    at = {f: detection_at(bad, good) for f, (bad, good) in both.items()}
    return sensor, SensorReport(sites, ridge, weight, best, calibrations, detection, auc, at)


@dataclass(frozen=True, eq=False)
class _Direction:
    """columns [n, d]: one direction through n sites' rows, each less its centre [d]."""

    sites: tuple[Site, ...]
    centres: Matrix
    columns: Matrix

    def scores(self, kind: Mapping[Site, Rows]) -> Matrix:
        parts = zip(self.sites, self.centres, self.columns, strict=True)
        return np.asarray(
            sum((rows_at(kind, site, "sensor") - centre) @ column for site, centre, column in parts)
        )

    def scaled(self, factor: float) -> _Direction:
        return _Direction(self.sites, self.centres, self.columns * factor)


def _direction(
    activations: Activations,
    kind: Mapping[Site, Rows],
    sites: tuple[Site, ...],
    ridge: float,
    chosen: Flags,
) -> _Direction:
    """Fitted on the chosen rows, so that harmless scores have deviation 1 within the forms."""
    harmful = activations.where(lambda s: s.label == "harmful")
    names = sorted({s.form for s, taken in zip(activations.samples, chosen, strict=True) if taken})
    group = np.array([names.index(s.form) if s.form in names else -1 for s in activations.samples])
    bad, good = chosen & harmful, chosen & ~harmful
    table, centres, scales = _side_by_side(kind, sites, good)
    through = discriminant_direction(table[bad], table[good], np.r_[group[bad], group[good]], ridge)
    along = table @ through
    within = np.concatenate(
        [along[good & (group == g)] - along[good & (group == g)].mean() for g in range(len(names))]
    )
    columns = through.reshape(centres.shape) / scales[:, None] / within.std()
    return _Direction(sites, centres, columns)


def _pooled(
    activations: Activations, sites: tuple[Site, ...], ridge: float, chosen: Flags
) -> _Direction:
    """The same for the mean over image tokens."""
    images = activations.where(lambda s: s.form != IMAGELESS)
    return _direction(activations, activations.image_mean, sites, ridge, chosen & images)


def _side_by_side(
    kind: Mapping[Site, Rows], sites: tuple[Site, ...], good: Flags
) -> tuple[Matrix, Matrix, Matrix]:
    """(rows [N, n d], centres [n, d], scales [n]): harmless rows have mean 0 and mean square 1."""
    tables, centres, scales = [], [], []
    for site in sites:
        rows = rows_at(kind, site, "sensor").astype(np.float64)
        centres.append(rows[good].mean(axis=0))
        rows = rows - centres[-1]
        scales.append(np.sqrt((rows[good] ** 2).sum(axis=1).mean()))
        tables.append(rows / scales[-1])
    return np.concatenate(tables, axis=1), np.array(centres), np.array(scales)


def _scores(activations: Activations, last: _Direction, pooled: _Direction | None) -> Matrix:
    scores = last.scores(activations.last)
    if pooled is None:
        return scores
    images = activations.where(lambda s: s.form != IMAGELESS)
    return np.asarray(scores + np.where(images, pooled.scores(activations.image_mean), 0))


def _choose_sites(
    fitting: Activations, plan: SensorPlan, groups: Sequence[Sequence[Form]]
) -> tuple[float, tuple[Site, ...], float]:
    """The best set of sites and ridge; of equals the smaller, earlier set and the larger ridge."""
    return max(
        (
            (
                _detected(fitting, _cross_fitted(fitting, s, ridge, None), groups, plan.rate),
                s,
                ridge,
            )
            for s in _site_sets(plan)
            for ridge in plan.ridges
        ),
        key=lambda entry: (entry[0], -len(entry[1]), -entry[1][0].depth, entry[2]),
    )


def _site_sets(plan: SensorPlan) -> Iterator[tuple[Site, ...]]:
    """Every site alone, then 2 to `readings` of them, spread evenly from the first to the last."""
    ordered = sorted(plan.sites, key=lambda site: site.depth)
    for site in ordered:
        yield (site,)
    for count in range(2, min(plan.readings, len(ordered)) + 1):
        places = np.round(np.linspace(0, len(ordered) - 1, count)).astype(int)
        yield tuple(ordered[place] for place in places)


def _choose_weight(
    fitting: Activations,
    plan: SensorPlan,
    sites: tuple[Site, ...],
    ridge: float,
    groups: Sequence[Sequence[Form]],
) -> tuple[float, float]:
    """The best weight of the pooled view; of equals the smaller."""
    return max(
        (
            (_detected(fitting, _cross_fitted(fitting, sites, ridge, w), groups, plan.rate), w)
            for w in plan.pooling
        ),
        key=lambda entry: (entry[0], -entry[1]),
    )


def _cross_fitted(
    fitting: Activations, sites: tuple[Site, ...], ridge: float, weight: float | None
) -> Matrix:
    """[N] score of each prompt by directions fitted without any form of it."""
    fold = folds(fitting.samples, FOLDS)
    scores = np.empty(len(fold))
    for held in range(FOLDS):
        others = fold != held
        last = _direction(fitting, fitting.last, sites, ridge, others)
        pooled = _pooled(fitting, sites, ridge, others).scaled(weight) if weight else None
        scores[~others] = _scores(fitting, last, pooled)[~others]
    return scores


def _detected(
    fitting: Activations, scores: Matrix, groups: Sequence[Sequence[Form]], rate: float
) -> float:
    """Mean over forms of the detection rate at the promised false-positive rate."""
    harmful = fitting.where(lambda s: s.label == "harmful")
    rows = _forms(fitting)
    found = []
    for group in groups:
        limit = calibrate({f: scores[rows[f] & ~harmful] for f in group}, rate).threshold
        found += [float((scores[rows[f] & harmful] > limit).mean()) for f in group]
    return float(np.mean(found))


def _groups(forms: Mapping[Form, Flags], apart: bool) -> list[list[Form]]:
    """Which forms share a threshold."""
    if not apart:
        return [list(forms)]
    return [[IMAGELESS], [form for form in forms if form != IMAGELESS]]


def _forms(activations: Activations) -> dict[Form, Flags]:
    present = sorted({sample.form for sample in activations.samples})
    return {form: np.array([s.form == form for s in activations.samples]) for form in present}


def _assembled(last: _Direction, pooled: _Direction | None, thresholds: Sequence[float]) -> Sensor:
    """The spec's sensor. A reading has one centre for both columns: the threshold for requests
    with an image takes up what the pooled column is moved by."""
    limits = list(thresholds)
    readings = []
    for index, (site, column) in enumerate(zip(last.sites, last.columns, strict=True)):
        centre, columns = last.centres[index], [column]
        if pooled is not None:
            columns.append(pooled.columns[index])
            limits[1] += float((pooled.centres[index] - centre) @ pooled.columns[index])
        readings.append(Reading(site, _f32(np.stack(columns, axis=1)), _f32(centre)))
    return Sensor(tuple(readings), tuple(limits))


def _f32(array: Matrix) -> Rows:
    return array.astype(np.float32)
