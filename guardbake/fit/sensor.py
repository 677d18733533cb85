"""Fit the sensor: a shrunken discriminant at one site, chosen by cross-fitted detection rate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from guardbake.activations import Activations
from guardbake.covariance import Matrix
from guardbake.diagnose.separability import area_under_curve, folds
from guardbake.fit.gate import Calibration, calibrate
from guardbake.fit.subspace import discriminant_direction
from guardbake.samples import Form
from guardbake.site import Site
from guardbake.spec import Sensor


@dataclass(frozen=True)
class SensorReport:
    """What the choice saw. detection[form]: harmful scores above the threshold, on `held_out`.

    cross_fitted: mean over forms of the detection rate at the promised false-positive rate, on the
    fitting prompts, each judged by a direction fitted without it.
    """

    site: Site
    ridge: float
    cross_fitted: float
    calibration: Calibration
    detection: Mapping[Form, float]
    auc: Mapping[Form, float]


def fit_sensor(
    fitting: Activations,
    held_out: Activations,
    sites: Sequence[Site],
    ridges: Sequence[float],
    rate: float,
) -> tuple[Sensor, SensorReport]:
    """Direction from `fitting`, site and ridge by cross-fitting there, threshold from `held_out`.

    rate: promised false-positive rate, kept on each form of the held-out harmless prompts.
    """
    best = max(
        (
            (_cross_fitted(fitting, site, ridge, rate), site, ridge)
            for site in sites
            for ridge in ridges
        ),
        key=lambda entry: (entry[0], -entry[1].depth, entry[2]),
    )
    cross_fitted, site, ridge = best
    direction, centre = _direction(fitting, site, ridge, np.ones(len(fitting.samples), bool))
    scores = (held_out.last[site].astype(np.float64) - centre) @ direction
    harmful = held_out.where(lambda s: s.label == "harmful")
    by_form = _forms(held_out)
    calibration = calibrate({f: scores[rows & ~harmful] for f, rows in by_form.items()}, rate)
    report = SensorReport(
        site,
        ridge,
        cross_fitted,
        calibration,
        {
            f: float((scores[r & harmful] > calibration.threshold).mean())
            for f, r in by_form.items()
        },
        {
            f: area_under_curve(scores[r & harmful], scores[r & ~harmful])
            for f, r in by_form.items()
        },
    )
    sensor = Sensor(
        site,
        direction.astype(np.float32),
        centre.astype(np.float32),
        calibration.threshold,
    )
    return sensor, report


def _forms(activations: Activations) -> dict[Form, npt.NDArray[np.bool_]]:
    present = sorted({sample.form for sample in activations.samples})
    return {form: np.array([s.form == form for s in activations.samples]) for form in present}


def _direction(
    activations: Activations, site: Site, ridge: float, chosen: npt.NDArray[np.bool_]
) -> tuple[Matrix, Matrix]:
    """(direction [d] unit, centre [d]) from the chosen rows."""
    rows = activations.last[site].astype(np.float64)
    harmful = activations.where(lambda s: s.label == "harmful")
    names = sorted({sample.form for sample in activations.samples})
    group = np.array([names.index(sample.form) for sample in activations.samples])
    bad, good = chosen & harmful, chosen & ~harmful
    direction = discriminant_direction(rows[bad], rows[good], np.r_[group[bad], group[good]], ridge)
    return direction, rows[good].mean(axis=0)


def _cross_fitted(fitting: Activations, site: Site, ridge: float, rate: float) -> float:
    fold = folds(fitting.samples, 5)
    rows = fitting.last[site].astype(np.float64)
    scores = np.empty(len(rows))
    for held in range(5):
        direction, centre = _direction(fitting, site, ridge, fold != held)
        scores[fold == held] = (rows[fold == held] - centre) @ direction
    harmful = fitting.where(lambda s: s.label == "harmful")
    by_form = _forms(fitting)
    limit = calibrate({f: scores[r & ~harmful] for f, r in by_form.items()}, rate).threshold
    return float(np.mean([(scores[r & harmful] > limit).mean() for r in by_form.values()]))
