"""Guards to compare: edits fitted on the fit split as the recipe's own candidates are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from guardbake.bundle.canonical import JSON
from guardbake.evaluate.judges import Verdict
from guardbake.evaluate.statistics import Interval, bootstrap_mean
from guardbake.fit.candidates import Candidate, candidates
from guardbake.recipe import CandidateSection
from guardbake.samples import Form
from guardbake.site import Site
from guardbake.spec import GuardSpec, linear_sensor
from guardbake.steps.contrasts import attribution_for, capture_contrasts
from guardbake.steps.fit import FIT_FORMS, identify, load_candidates, save_candidates
from guardbake.studies.setting import Asked, Setting
from guardbake.vlm.capture import capture, every_site

_GUARDS = "guards"


@dataclass(frozen=True)
class Shares:
    """How often one verdict fell, mean over forms. by_form[form]; over_forms with its interval over
    prompts, which are asked once in every form."""

    by_form: dict[Form, float]
    over_forms: Interval

    def to_json(self) -> dict[str, object]:
        return {"by_form": dict(self.by_form), **self.over_forms.to_json()}


def shares(asked: Asked, verdicts: Sequence[Verdict], wanted: Verdict, seed: int) -> Shares:
    """verdicts: one a sample of `asked`, which holds the same prompts in every form."""
    flags: dict[Form, list[float]] = {}
    for sample, verdict in zip(asked.samples, verdicts, strict=True):
        flags.setdefault(sample.form, []).append(float(verdict == wanted))
    by_form = {form: float(np.mean(own)) for form, own in flags.items()}
    return Shares(by_form, bootstrap_mean(np.mean(list(flags.values()), axis=0), seed, 2000))


def fitted_guards(
    setting: Setting,
    sections: Sequence[CandidateSection],
    around: Callable[[Candidate], GuardSpec],
    key: JSON,
) -> dict[str, GuardSpec]:
    """Every candidate of the sections as `around` makes a guard of it, by name; a stage.

    key: what `around` depends on besides the candidate.
    """
    bake = setting.bake
    content: dict[str, JSON] = {
        "model": bake.vlm.model_digest,
        "samples": bake.splits.digests["fit"],
        "sections": [section.model_dump(mode="json") for section in sections],
        "fit": bake.recipe.fit.model_dump(mode="json"),
        "typography": bake.recipe.samples.typography.model_dump(mode="json"),
        "around": key,
        **bake.versions("guards"),
    }

    def build(folder: Path) -> None:
        specs = {one.name: around(one) for one in _fit(setting, sections)}
        save_candidates(specs, folder / _GUARDS)

    return load_candidates(bake.stage("guards", content, build) / _GUARDS)


def _fit(setting: Setting, sections: Sequence[CandidateSection]) -> list[Candidate]:
    bake = setting.bake
    size, advance = bake.recipe.batch_size, bake.reporter.advance
    section = bake.recipe.fit.model_copy(update={"candidates": list(sections)})
    prompts = capture(
        bake.vlm,
        bake.splits.samples("fit", FIT_FORMS),
        every_site(bake.vlm),
        bake.typography,
        size,
        partial(advance, "capturing the fit split"),
        attribution_for(section),
    )
    contrasts = capture_contrasts(
        bake.vlm, section, bake.splits, prompts, bake.typography, size, advance
    )
    return list(candidates(section.candidates, contrasts))


def always_open(setting: Setting, candidate: Candidate) -> GuardSpec:
    """The candidate's edits with a gate that opens for every prompt: the edit alone is seen."""
    model = identify(setting.bake.vlm)
    direction = np.zeros(model.width, np.float32)
    direction[0] = 1
    # no activation comes near it, and float32 holds it
    sensor = linear_sensor(Site(0, "ffn_output"), direction, np.zeros_like(direction), -1e30)
    return GuardSpec(model, candidate.method, "sequence", (sensor,), candidate.edits, {})
