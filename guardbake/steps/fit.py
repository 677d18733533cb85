"""The fit stage: capture, sensor, candidates, sign test; a guard, or a refusal to write one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from guardbake.activations import Activations
from guardbake.artifact import load_guard, save_guard
from guardbake.diagnose.separability import separability
from guardbake.evaluate.judges import judge
from guardbake.fit.candidates import candidates
from guardbake.fit.sign_test import Budget, Outcome, choose
from guardbake.recipe import Recipe
from guardbake.samples import SENSED, Form, Sample
from guardbake.site import Site
from guardbake.spec import GuardSpec, ModelIdentity
from guardbake.steps.contrasts import attribution_for, capture_contrasts
from guardbake.steps.gates import behind_first_gate, fit_gates
from guardbake.steps.records import read_record, write_record
from guardbake.steps.split import Splits
from guardbake.vlm.behaviour import Questions
from guardbake.vlm.capture import capture, every_site
from guardbake.vlm.load import Vlm
from guardbake.vlm.requests import Typography

_NAMES = "candidates.json"
FIT_FORMS: tuple[Form, ...] = ("text", "typographic")
"""The forms that edits are fitted on."""
SENSOR_FORMS: tuple[Form, ...] = ("text", "natural", "typographic")
"""The forms that a gate's directions are fitted on, unless it pools: then on all of `SENSED`."""


class Advance(Protocol):
    """Told what is going on and how far it is."""

    def __call__(self, what: str, done: int, total: int) -> None: ...


def fit_guard(
    vlm: Vlm,
    recipe: Recipe,
    splits: Splits,
    typography: Typography,
    layers: Mapping[str, Any] | None,
    advance: Advance,
) -> tuple[GuardSpec, dict[str, Any], dict[str, GuardSpec]]:
    """The guard, the figures that led to it, and every candidate by name.

    layers: what a diagnosis says of them, for the guard's provenance; None without one. Raises
    BehaviourError if no candidate may be written.
    """
    section, size = recipe.fit.contest, recipe.batch_size
    sites = every_site(vlm)
    forms = FIT_FORMS if section.sensor is None else SENSOR_FORMS
    if section.sensor is not None and section.sensor.pooling:
        forms = SENSED
    fitting = capture(
        vlm,
        splits.samples("fit", forms),
        sites,
        typography,
        size,
        partial(advance, "capturing the fit split"),
        attribution_for(section),
    )
    contrasts = capture_contrasts(vlm, section, splits, fitting, typography, size, advance)
    questions = Questions(
        vlm,
        splits.samples("validate"),
        typography,
        size,
        lambda done, total: advance("reading the validation split", done, total),
    )
    gates = fit_gates(vlm, section, splits, fitting, typography, size, advance)
    tried = list(candidates(section.candidates, contrasts))
    identity = identify(vlm)
    specs = {c.name: gates.guard(identity, c, {}) for c in tried}
    tell = partial(advance, "sign test: undefended")
    said = questions.ask(None, section.tokens, tell)
    baseline = outcome_of(questions.samples, "undefended", said)
    outcomes = []
    for name, spec in specs.items():
        tell = partial(advance, f"sign test: {name}")
        answers = questions.ask(spec, section.tokens, tell, undefended=said)
        outcomes.append(outcome_of(questions.samples, name, answers))
    budget = Budget(section.harmless_rise, section.degenerate)
    best, verdicts = choose(outcomes, baseline, budget)
    chosen = next(c for c in tried if c.name == best.outcome.name)
    figures = {
        "separability": _separability(fitting, splits.forms(FIT_FORMS)),
        "sensors": gates.figures(chosen),
        "undefended": baseline.rates(),
        "sign_test": [
            {"candidate": v.outcome.name, "rise": v.rise, "refused_because": list(v.reasons)}
            | v.outcome.rates()
            for v in verdicts
        ],
        "subspaces": {c.name: c.evidence for c in tried if c.evidence},
        "chosen": best.outcome.name,
    }
    provenance = {
        "samples": dict(splits.digests),
        "layers": None if layers is None else dict(layers),
        "chosen": best.outcome.name,
        "rise": round(best.rise, 6),
        "false_positive_rate": section.sensor.false_positive_rate if section.sensor else None,
    }
    return gates.guard(identity, chosen, provenance), figures, specs


def fit_rivals(
    vlm: Vlm,
    recipe: Recipe,
    splits: Splits,
    typography: Typography,
    fitted: GuardSpec,
    advance: Advance,
) -> dict[str, GuardSpec]:
    """The recipe's rivals by name, behind the fitted guard's first gate; not tried."""
    section, size = recipe.fit.rivalry, recipe.batch_size
    layers = sorted({layer for candidate in section.candidates for layer in candidate.layers})
    fitting = capture(
        vlm,
        splits.samples("fit", FIT_FORMS),
        [Site(layer, boundary) for layer in layers for boundary in ("ffn_output", "residual")],
        typography,
        size,
        partial(advance, "capturing the fit split"),
        attribution_for(section),
    )
    contrasts = capture_contrasts(vlm, section, splits, fitting, typography, size, advance)
    return {c.name: behind_first_gate(fitted, c) for c in candidates(section.candidates, contrasts)}


def save_candidates(specs: Mapping[str, GuardSpec], folder: Path) -> None:
    """The guards that were tried, one pack each, and candidates.json with their names in order.

    They are there to be compared; what may be shipped is the chosen one alone.
    """
    folder.mkdir()
    for number, spec in enumerate(specs.values()):
        save_guard(spec, folder / f"{number:02}.safetensors")
    write_record(folder / _NAMES, {"names": list(specs)})


def load_candidates(folder: Path) -> dict[str, GuardSpec]:
    """What `save_candidates` wrote, in order. Raises MalformedError or IntegrityError."""
    names = read_record(folder / _NAMES)["names"]
    return {name: load_guard(folder / f"{n:02}.safetensors") for n, name in enumerate(names)}


def identify(vlm: Vlm) -> ModelIdentity:
    config: Any = vlm.model.config
    text = config.get_text_config()
    return ModelIdentity(
        vlm.family.name, text.num_hidden_layers, text.hidden_size, vlm.model_digest
    )


def outcome_of(samples: Sequence[Sample], name: str, answers: Sequence[str]) -> Outcome:
    """What was generated under one guard, judged."""
    verdicts = np.array([judge(answer) for answer in answers])
    forms = list(dict.fromkeys(s.form for s in samples))

    def flags(form: Form, label: str, verdict: str) -> np.ndarray:
        rows = _rows(samples, form, label)
        return np.asarray(verdicts[rows] == verdict)

    return Outcome(
        name,
        {form: flags(form, "harmful", "refused") for form in forms},
        {form: flags(form, "harmless", "refused") for form in forms},
        {
            f"{label} {form}": float(flags(form, label, "degenerate").mean())
            for form in forms
            for label in ("harmful", "harmless")
        },
    )


def _rows(samples: Sequence[Sample], form: Form, label: str) -> list[int]:
    return [i for i, s in enumerate(samples) if s.form == form and s.label == label]


def _separability(fitting: Activations, forms: Sequence[Form]) -> list[dict[str, Any]]:
    return [
        {"site": str(report.place), "forms": {f: s.to_json() for f, s in report.forms.items()}}
        for report in separability(fitting.samples, fitting.last, forms)
    ]
