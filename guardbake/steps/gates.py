"""The gates of a fit: one sensor for all edits, and one a layer where candidates ask for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from guardbake.activations import Activations
from guardbake.fit.candidates import Candidate
from guardbake.fit.sensor import SensorPlan, SensorReport, fit_sensor
from guardbake.recipe import FitSection, SensorSection
from guardbake.samples import SENSED
from guardbake.site import Site
from guardbake.spec import GuardSpec, ModelIdentity, Profile, Sensor
from guardbake.steps.split import Splits
from guardbake.steps.staging import Advance
from guardbake.vlm.capture import capture
from guardbake.vlm.load import Vlm
from guardbake.vlm.requests import Typography

Fitted = tuple[Sensor, SensorReport]


@dataclass(frozen=True, eq=False)
class Gates:
    """profile: of the guards. common: for all edits of a candidate, None for the profile always.
    own[layer]: for the edit of that layer, in candidates whose layers have a gate each."""

    profile: Profile
    common: Fitted | None
    own: Mapping[int, Fitted]

    def guard(
        self, model: ModelIdentity, candidate: Candidate, provenance: Mapping[str, Any]
    ) -> GuardSpec:
        """The candidate's edits behind its gates."""
        edits = candidate.edits
        if candidate.own_gates:
            edits = tuple(replace(edit, gate=gate) for gate, edit in enumerate(edits))
        sensors = tuple(sensor for sensor, _ in self._of(candidate))
        return GuardSpec(model, candidate.method, self.profile, sensors, edits, provenance)

    def figures(self, candidate: Candidate) -> list[dict[str, Any]]:
        """What the fit of each of the candidate's sensors saw, as JSON values."""
        return [_figures(report) for _, report in self._of(candidate)]

    def _of(self, candidate: Candidate) -> Sequence[Fitted]:
        if candidate.own_gates:
            return [self.own[edit.site.layer] for edit in candidate.edits]
        return [] if self.common is None else [self.common]


def behind_first_gate(guard: GuardSpec, candidate: Candidate) -> GuardSpec:
    """The candidate's edits in the place of a guard's own, all behind the first of its gates."""
    method, edits = candidate.method, candidate.edits
    sensors = guard.sensors[:1]
    return replace(guard, method=method, sensors=sensors, edits=edits, provenance={})


def fit_gates(
    vlm: Vlm,
    section: FitSection,
    splits: Splits,
    fitting: Activations,
    typography: Typography,
    size: int,
    advance: Advance,
) -> Gates:
    """Directions from `fitting`, the fit split; every threshold from the same other prompts.

    A layer's own sensor reads the residual that enters the layer, as VLM-Guard (arXiv 2502.10486)
    gates each by its hidden state. It is calibrated on the undefended model, whose stream a prompt
    has behind gates that stay shut.
    """
    if section.sensor is None:
        return Gates(section.profile, None, {})
    first, last = section.sensor.layers
    sites = [Site(layer, "residual") for layer in range(first, last + 1)]
    entering = {
        layer: Site(layer - 1, "residual")
        for layer in sorted({n for c in section.candidates if c.gates == "each" for n in c.layers})
    }
    held_out = capture(
        vlm,
        splits.samples("calibrate", SENSED),
        sorted({*sites, *entering.values()}, key=lambda site: site.depth),
        typography,
        size,
        partial(advance, "capturing the prompts to calibrate on"),
    )
    common = fit_sensor(fitting, held_out, _plan(section.sensor, sites))
    own = {
        layer: fit_sensor(fitting, held_out, _single(section.sensor, site))
        for layer, site in entering.items()
    }
    return Gates(section.profile, common, own)


def _plan(section: SensorSection, sites: Sequence[Site]) -> SensorPlan:
    return SensorPlan(
        sites, section.readings, section.ridges, section.false_positive_rate, section.pooling
    )


def _single(section: SensorSection, site: Site) -> SensorPlan:
    return SensorPlan([site], 1, section.ridges, section.false_positive_rate)


def _figures(report: SensorReport) -> dict[str, Any]:
    return {
        "sites": [str(site) for site in report.sites],
        "ridge": report.ridge,
        "pooling": report.pooling,
        "levelled": report.levelled,
        "tried": report.tried,
        "thresholds": [c.threshold for c in report.calibrations],
        "harmless_open_rate": {f: r for c in report.calibrations for f, r in c.open_rate.items()},
        "harmful_open_rate": dict(report.detection),
        "auc": dict(report.auc),
        "detection_at": {form: dict(rates) for form, rates in report.at.items()},
    }
