"""Fit the sensor: a shrunken discriminant over several sites, judged by what it detects elsewhere.

The rows of the sites are scaled alike and stand side by side; one direction through all of them is
one MatMul a site in the graph. A pooling sensor adds what the image tokens say on average where
that accuses, and has thresholds of its own for requests with an image (METHODS 8: the sensor does
the protecting). What image tokens say also tells drawn requests from pictures without words, whose
scores need another threshold: levelled, the pooled direction raises each form until one threshold
serves them all.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from guardbake.activations import Activations, Rows, rows_at
from guardbake.covariance import Matrix, solve_shrunken
from guardbake.diagnose.separability import area_under_curve
from guardbake.fit.gate import (
    Calibration,
    calibrate,
    detection_at,
    next_float32,
    upper_quantile,
)
from guardbake.fit.subspace import discriminant_direction
from guardbake.samples import Form
from guardbake.site import Site
from guardbake.spec import Reading, Sensor

Flags = npt.NDArray[np.bool_]
IMAGELESS: Form = "text"


@dataclass(frozen=True)
class SensorPlan:
    """What is tried. readings: most sites read together. ridges: relative to tr(C)/d. rate: the
    promised false-positive rate. pooling: weights of the image tokens' mean beside the last token,
    both in harmless standard deviations; with any, the sensor has the thresholds of
    `semantics.pooled_score`."""

    sites: Sequence[Site]
    readings: int
    ridges: Sequence[float]
    rate: float
    pooling: Sequence[float] = ()


@dataclass(frozen=True)
class SensorReport:
    """What the choice saw.

    tried: how many sensors were held against one another, by the mean of `detection` over forms.
    pooling: the weight taken; levelled: whether the forms with an image were raised to one level.
    detection[form]: harmful scores above the threshold; auc[form]; at[form][rate]: detection at
    other false-positive rates of that form. All three on `held_out`.
    """

    sites: tuple[Site, ...]
    ridge: float
    pooling: float
    levelled: bool
    tried: int
    calibrations: tuple[Calibration, ...]
    detection: Mapping[Form, float]
    auc: Mapping[Form, float]
    at: Mapping[Form, Mapping[str, float]]


def fit_sensor(
    fitting: Activations, held_out: Activations, plan: SensorPlan
) -> tuple[Sensor, SensorReport]:
    """Directions from `fitting`; thresholds, sites, ridge and weight from `held_out`.

    The rate is kept on the harmless prompts of each form. Of all that is tried the sensor that then
    detects most of the harmful ones is taken, averaged over forms. Cross-fitting on the fitting
    prompts was tried first: within their own sources every sensor finds nearly all, and what tells
    sensors apart is harm from elsewhere. The choice makes the promised rate slightly optimistic.
    """
    held = _HeldOut(held_out, bool(plan.pooling), plan.rate)
    tried = [
        _Tried(held.detected(_scores(held_out, view)), view, ridge)
        for sites in _site_sets(plan)
        for ridge in plan.ridges
        for view in _views(fitting, held_out, sites, ridge, held, plan.pooling)
    ]
    best = max(tried, key=_Tried.preference)
    view, scores = best.view, _scores(held_out, best.view)
    calibrations = held.calibrations(scores)
    sensor = _assembled(view, [c.threshold for c in calibrations])
    report = SensorReport(
        view.last.sites,
        best.ridge,
        view.weight,
        view.levelled,
        len(tried),
        calibrations,
        *held.figures(scores),
    )
    return sensor, report


@dataclass(frozen=True, eq=False)
class _View:
    """What a sensor reads: pooled, if it pools, has its weight in it. lift: how much higher the
    threshold lies where the image tokens count."""

    last: _Direction
    pooled: _Direction | None = None
    weight: float = 0.0
    levelled: bool = False
    lift: float = 0.0


@dataclass(frozen=True, eq=False)
class _Tried:
    detected: float
    view: _View
    ridge: float

    def preference(self) -> tuple[float, ...]:
        """The best detection; of equal ones the plainest, earliest and most shrunken sensor."""
        view, sites = self.view, self.view.last.sites
        plain = (-len(sites), -sites[0].depth, -view.weight, -view.levelled)
        return self.detected, *plain, self.ridge


class _HeldOut:
    """Held-out prompts, in groups of forms that share a threshold."""

    def __init__(self, activations: Activations, apart: bool, rate: float) -> None:
        """apart: whether requests with an image have a threshold of their own."""
        rows = _forms(activations)
        harmful = activations.where(lambda s: s.label == "harmful")
        pictured = [form for form in rows if form != IMAGELESS]
        alone = [IMAGELESS] if IMAGELESS in rows else pictured  # which then is never asked
        self._groups = [alone, pictured] if apart else [list(rows)]
        self._bad = {form: rows[form] & harmful for form in rows}
        self._good = {form: rows[form] & ~harmful for form in rows}
        self._rate = rate

    def calibrations(self, scores: Matrix) -> tuple[Calibration, ...]:
        return tuple(
            calibrate({form: scores[self._good[form]] for form in group}, self._rate)
            for group in self._groups
        )

    def detection(self, scores: Matrix) -> dict[Form, float]:
        """Share of harmful prompts above their group's threshold, by form."""
        pairs = zip(self.calibrations(scores), self._groups, strict=True)
        limits = {form: c.threshold for c, group in pairs for form in group}
        return {f: float((scores[self._bad[f]] > limit).mean()) for f, limit in limits.items()}

    def gaps(self, scores: Matrix, first: Form, others: Iterable[Form]) -> dict[Form, float]:
        """How far below the first form's own threshold each other one's lies."""
        if first not in self._good:
            return {}
        own = {
            form: upper_quantile(scores[self._good[form]], self._rate)
            for form in (first, *others)
            if form in self._good
        }
        return {form: own[first] - limit for form, limit in own.items() if form != first}

    def lift(self, alone: Matrix, counted: Matrix) -> float:
        """How much higher than without them the rate's threshold lies if image tokens count."""
        pictured = [rows for form, rows in self._good.items() if form != IMAGELESS]
        below, above = (
            max(upper_quantile(scores[rows], self._rate) for rows in pictured)
            for scores in (alone, counted)
        )
        return above - below

    def detected(self, scores: Matrix) -> float:
        return float(np.mean(list(self.detection(scores).values())))

    def figures(
        self, scores: Matrix
    ) -> tuple[dict[Form, float], dict[Form, float], dict[Form, dict[str, float]]]:
        """detection, auc and detection at other rates, by form."""
        both = {form: (scores[self._bad[form]], scores[self._good[form]]) for form in self._bad}
        return (
            self.detection(scores),
            {form: area_under_curve(bad, good) for form, (bad, good) in both.items()},
            {form: detection_at(bad, good) for form, (bad, good) in both.items()},
        )


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

    def plus(self, more: Iterable[Matrix]) -> _Direction:
        return _Direction(self.sites, self.centres, sum(more, start=self.columns))


def _direction(
    activations: Activations,
    kind: Mapping[Site, Rows],
    sites: tuple[Site, ...],
    ridge: float,
    chosen: Flags | None = None,
) -> _Direction:
    """Fitted on the chosen rows, so that harmless scores have deviation 1 within the forms."""
    if chosen is None:
        chosen = np.ones(len(activations.samples), bool)
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


def _pooled(activations: Activations, sites: tuple[Site, ...], ridge: float) -> _Direction:
    """The same for the mean over image tokens."""
    images = activations.where(lambda s: s.form != IMAGELESS)
    return _direction(activations, activations.image_mean, sites, ridge, images)


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


def _raising(
    fitting: Activations, sites: tuple[Site, ...], ridge: float
) -> tuple[Form, dict[Form, Matrix]]:
    """The first image form, and by other one: columns [n, d] along which its rows lie 1 above the
    first's, on average and all other forms' with them, and vary as little as may be within forms.
    """
    forms = [form for form in _forms(fitting) if form != IMAGELESS]
    rows, harmful = _forms(fitting), fitting.where(lambda s: s.label == "harmful")
    images = fitting.where(lambda s: s.form != IMAGELESS)
    table, centres, scales = _side_by_side(fitting.image_mean, sites, images & ~harmful)
    groups = [rows[form] & kind for form in forms for kind in (harmful, ~harmful)]
    within = np.concatenate([table[group] - table[group].mean(axis=0) for group in groups])
    means = np.stack([table[rows[form] & ~harmful].mean(axis=0) for form in forms])
    apart = (means[1:] - means[0]).T
    solved = solve_shrunken(within, ridge, apart, "levelling the image forms")
    # least squares: forms of the same mean cannot be raised apart, and are left as they are
    unit = solved @ np.linalg.lstsq(apart.T @ solved, np.eye(len(forms) - 1), rcond=None)[0]
    shaped = unit.T.reshape(len(forms) - 1, *centres.shape) / scales[:, None]
    return forms[0], dict(zip(forms[1:], shaped, strict=True))


def _scores(activations: Activations, view: _View) -> Matrix:
    """By the law, but for the threshold."""
    scores = view.last.scores(activations.last)
    if view.pooled is None:
        return scores
    accused = np.maximum(0, view.pooled.scores(activations.image_mean) - view.lift)
    images = activations.where(lambda s: s.form != IMAGELESS)
    return np.asarray(scores + np.where(images, accused, 0))


def _views(
    fitting: Activations,
    held_out: Activations,
    sites: tuple[Site, ...],
    ridge: float,
    held: _HeldOut,
    weights: Sequence[float],
) -> Iterator[_View]:
    """The last token alone without weights; else it with each weight of the image tokens, as they
    are and levelled."""
    last = _direction(fitting, fitting.last, sites, ridge)
    if not weights:
        yield _View(last)
        return
    pooled, (first, raising) = _pooled(fitting, sites, ridge), _raising(fitting, sites, ridge)
    images = held_out.where(lambda s: s.form != IMAGELESS)
    alone = last.scores(held_out.last)
    for weight in weights:
        weighted = pooled.scaled(weight)
        counted = alone + np.where(images, weighted.scores(held_out.image_mean), 0)
        yield _View(last, weighted, weight, False, held.lift(alone, counted))
        gaps = held.gaps(counted, first, raising)
        if gaps:
            level = weighted.plus(gap * raising[form] for form, gap in gaps.items())
            counted = alone + np.where(images, level.scores(held_out.image_mean), 0)
            yield _View(last, level, weight, True, held.lift(alone, counted))


def _site_sets(plan: SensorPlan) -> Iterator[tuple[Site, ...]]:
    """Every site alone, then 2 to `readings` of them, spread evenly from the first to the last."""
    ordered = sorted(plan.sites, key=lambda site: site.depth)
    for site in ordered:
        yield (site,)
    for count in range(2, min(plan.readings, len(ordered)) + 1):
        places = np.round(np.linspace(0, len(ordered) - 1, count)).astype(int)
        yield tuple(ordered[place] for place in places)


def _forms(activations: Activations) -> dict[Form, Flags]:
    present = sorted({sample.form for sample in activations.samples})
    return {form: np.array([s.form == form for s in activations.samples]) for form in present}


def _assembled(view: _View, thresholds: Sequence[float]) -> Sensor:
    """The spec's sensor. A reading has one centre for both columns: the threshold of requests
    whose image tokens count takes up what the pooled column is moved by."""
    last, pooled, limits = view.last, view.pooled, list(thresholds)
    if pooled is not None:
        limits.append(limits[1] + view.lift)
    readings = []
    for index, (site, column) in enumerate(zip(last.sites, last.columns, strict=True)):
        centre, columns = last.centres[index], [column]
        if pooled is not None:
            columns.append(pooled.columns[index])
            limits[2] += float((pooled.centres[index] - centre) @ pooled.columns[index])
        readings.append(Reading(site, _f32(np.stack(columns, axis=1)), _f32(centre)))
    return Sensor(tuple(readings), tuple(map(next_float32, limits)))


def _f32(array: Matrix) -> Rows:
    return array.astype(np.float32)
