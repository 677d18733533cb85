"""The diagnose stage: which layers, which half of them, by causes and by separability.

Everything is measured on the fit split, which shares no prompt with those that guards are judged
on.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from guardbake.bundle.canonical import digest_of
from guardbake.bundle.folders import new_folder
from guardbake.component import Component
from guardbake.diagnose.ablation import Ablation, ablations, choose_donors
from guardbake.diagnose.choose import choose_layers
from guardbake.diagnose.effects import Effect, Numbers, bootstrap
from guardbake.diagnose.openings import Openings, openings_of
from guardbake.diagnose.prompts import embed_prompts
from guardbake.diagnose.separability import PlaceReport, separability
from guardbake.diagnose.trace import Means, Traced, Tracer
from guardbake.diagnose.trace_loop import AblatedBatch
from guardbake.errors import BehaviourError, RecipeError
from guardbake.evaluate.judges import judge
from guardbake.recipe import Recipe
from guardbake.recipe_diagnose import DiagnoseSection
from guardbake.report.diagnosis import diagnosis_to_markdown, draw_diagnosis
from guardbake.samples import Form, Sample
from guardbake.samples.collect import in_forms
from guardbake.samples.splits import take
from guardbake.steps.fit import FIT_FORMS, Advance
from guardbake.steps.records import read_record
from guardbake.steps.split import Splits
from guardbake.vlm.components import capture_components
from guardbake.vlm.load import Vlm
from guardbake.vlm.requests import Typography, batches

# Tokens that go through a layer together: enough to keep it busy, few enough for its memory.
TOKENS_AT_A_TIME = 2048
DIAGNOSIS_TEXT = "DIAGNOSIS.md"


@dataclass(frozen=True, eq=False)
class Cause:
    """One form's trace. answered, degenerate:
    by ablation, 0 or 1 for each harmful prompt; None is the model as it is."""

    samples: Sequence[Sample]
    traced: Traced
    answered: dict[Ablation | None, Numbers]
    degenerate: dict[Ablation | None, Numbers]

    @property
    def harmful(self) -> np.ndarray:
        return np.array([s.label == "harmful" for s in self.samples])

    def divergence(self, ablation: Ablation) -> float:
        """Mean over the harmless prompts, in nats."""
        return float(self.traced.divergence[ablation][~self.harmful].mean())


def diagnose(
    vlm: Vlm,
    recipe: Recipe,
    section: DiagnoseSection,
    splits: Splits,
    typography: Typography,
    advance: Advance,
) -> dict[str, Any]:
    """Both families of curves and the choice, as JSON values.

    Raises RecipeError if the fit split has too few prompts.
    """
    openings = openings_of(
        vlm.processor.tokenizer, recipe.fit.refusing, recipe.fit.compliant, section.opening
    )
    causes, forms = {}, splits.forms(FIT_FORMS)
    for form in forms:
        traced, donors = _drawn(splits, section, form)
        tracing = _Tracing(vlm, section, openings, typography, recipe.batch_size, advance)
        causes[form] = tracing.run(traced, donors, form)
    samples = splits.samples("fit", forms)
    rows = capture_components(
        vlm, samples, typography, recipe.batch_size, partial(advance, "capturing components")
    )
    apart = separability(samples, rows, forms)
    layers = 1 + max(report.place.layer for report in apart)
    decisive = [Ablation(n, "ffn", section.decide) for n in range(layers)]
    choice = choose_layers(
        [_cause(causes, ablation, section) for ablation in decisive],
        [max(cause.divergence(ablation) for cause in causes.values()) for ablation in decisive],
        [_ffn(apart, n).worst("mahalanobis") for n in range(layers)],
        section.divergence,
        section.layers,
    )
    return {
        "model": vlm.model_digest,
        "samples": splits.digests["fit"],
        "section": section.model_dump(mode="json"),
        "openings": {"refusing": len(openings.refusing), "compliant": len(openings.compliant)},
        "causes": {form: _effects(cause, section) for form, cause in causes.items()},
        "separability": [
            {
                "layer": report.place.layer,
                "component": report.place.name,
                "forms": {form: seen.to_json() for form, seen in report.forms.items()},
            }
            for report in apart
        ],
        "choice": choice.to_json() | {"decided_by": f"{section.decide} ffn"},
    }


def _drawn(
    splits: Splits, section: DiagnoseSection, form: Form
) -> tuple[list[Sample], list[Sample]]:
    """(harmful and as many harmless samples to trace, harmless donors), drawn by content."""
    prompts = [p for p in splits.prompts["fit"] if p.image is None]
    harmful = [p for p in prompts if p.label == "harmful"]
    harmless = [p for p in prompts if p.label == "harmless"]
    needed = section.prompts + section.donors
    if len(harmful) < section.prompts or len(harmless) < needed:
        raise RecipeError(
            found=f"{len(harmful)} harmful and {len(harmless)} harmless prompts to trace",
            expected=f"{section.prompts} and {needed}: as many harmless ones and the donors",
            where="samples.fit",
            remedy="add sources, or lower diagnose.prompts or diagnose.donors",
        )
    bad = take(harmful, section.prompts, section.seed)
    good = take(harmless, needed, section.seed)
    traced = in_forms(bad + good[: section.prompts], (form,))
    return traced, in_forms(good[section.prompts :], (form,))


class _Tracing:
    """One form after another through the same model."""

    def __init__(
        self,
        vlm: Vlm,
        section: DiagnoseSection,
        openings: Openings,
        typography: Typography,
        batch_size: int,
        advance: Advance,
    ) -> None:
        self._vlm, self._section, self._typography = vlm, section, typography
        self._size, self._advance = batch_size, advance
        self._tracer = Tracer(vlm, openings, TOKENS_AT_A_TIME)

    def run(self, samples: list[Sample], donors: list[Sample], form: Form) -> Cause:
        section = self._section
        own, other = (
            embed_prompts(self._vlm, some, self._typography, self._size)
            for some in (samples, donors)
        )
        chosen = choose_donors([len(p) for p in own], [len(p) for p in other], section.seed)
        means = self._tracer.means(other)
        wanted = list(ablations(len(means), section.parts, section.kinds))
        traced = self._tracer.trace(
            own,
            [other[i] for i in chosen],
            means,
            wanted,
            partial(self._advance, f"tracing {form} prompts"),
        )
        answered, degenerate = self._generated(
            [(s, donors[i]) for s, i in zip(samples, chosen, strict=True) if s.label == "harmful"],
            means,
            [a for a in wanted if a.kind in section.generate],
            form,
        )
        return Cause(samples, traced, answered, degenerate)

    def _generated(
        self, pairs: list[tuple[Sample, Sample]], means: Means, wanted: list[Ablation], form: Form
    ) -> tuple[dict[Ablation | None, Numbers], dict[Ablation | None, Numbers]]:
        """Share of answers and of degenerate ones, by ablation; nothing if nothing is wanted."""
        if not wanted:
            return {}, {}
        which: list[Ablation | None] = [None, *wanted]
        verdicts: dict[Ablation | None, list[str]] = {ablation: [] for ablation in which}
        beside = any(ablation.kind == "resample" for ablation in wanted)
        total, done = len(which) * len(pairs), 0
        for start in range(0, len(pairs), self._size):
            some = pairs[start : start + self._size]
            requests = [own for own, _ in some] + [donor for _, donor in some if beside]
            ((_, batch),) = batches(self._vlm, requests, self._typography, len(requests))
            ablated = AblatedBatch(self._vlm, batch, len(some), means)
            for ablation in which:
                texts = ablated.answers(ablation, self._section.tokens)
                verdicts[ablation] += [judge(text) for text in texts]
                done += len(some)
                self._advance(f"answering {form} prompts under ablations", done, total)
        shares = [
            {a: np.array([v == kind for v in found], float) for a, found in verdicts.items()}
            for kind in ("answered", "degenerate")
        ]
        return shares[0], shares[1]


def _cause(causes: dict[Form, Cause], ablation: Ablation, section: DiagnoseSection) -> Effect:
    """The curve that RULE ranks by: prompt by prompt the mean over the forms."""
    drops = [cause.traced.score - cause.traced.ablated[ablation] for cause in causes.values()]
    drop, harmful = np.mean(drops, axis=0), next(iter(causes.values())).harmful
    return bootstrap(drop[harmful], section.rounds, section.seed, drop[~harmful])


def _effects(cause: Cause, section: DiagnoseSection) -> dict[str, Any]:
    def over(values: np.ndarray, less: np.ndarray | None = None) -> dict[str, float | int]:
        return bootstrap(values, section.rounds, section.seed, less).to_json()

    score, bad = cause.traced.score, cause.harmful
    rows = []
    for ablation, under in cause.traced.ablated.items():
        row: dict[str, Any] = {
            "part": ablation.part,
            "kind": ablation.kind,
            "layer": ablation.layer,
            "drop_harmful": over((score - under)[bad]),
            "drop_harmless": over((score - under)[~bad]),
            "cause": over((score - under)[bad], (score - under)[~bad]),
            "divergence": over(cause.traced.divergence[ablation][~bad]),
        }
        if ablation in cause.answered:
            rise = cause.answered[ablation] - cause.answered[None]
            row["attack_rise"] = over(rise)
            row["degenerate"] = float(cause.degenerate[ablation].mean())
        rows.append(row)
    return {
        "score_harmful": over(score[bad]),
        "score_harmless": over(score[~bad]),
        "attack_success": over(cause.answered[None]) if cause.answered else None,
        "effects": rows,
    }


def _ffn(reports: Sequence[PlaceReport[Component]], layer: int) -> PlaceReport[Component]:
    return next(report for report in reports if report.place == Component(layer, "ffn_output"))


def evidence(content: Mapping[str, Any]) -> dict[str, Any]:
    """What a guard pack records: the rule, its choice, and where either curve peaks.

    Numbers are rounded to six places: enough to compare, and the same on every machine that
    computes the same diagnosis.
    """
    choice = content["choice"]
    return {
        "rule": choice["rule"],
        "decided_by": choice["decided_by"],
        "chosen": choice["layers"],
        "evidence": [
            _rounded(row) for row in choice["evidence"] if row["layer"] in choice["layers"]
        ],
        "peaks": {
            name: max(rows, key=lambda row: (row[1], -row[0]))[0]
            for name, rows in _choice_curves(choice["evidence"]).items()
        },
        "diagnosis": digest_of(dict(content)),
    }


def publish_diagnosis(record: Path, out: Path) -> None:
    """The folder `out`: diagnosis.json, its plots and DIAGNOSIS.md; appears whole or not at all."""
    content = read_record(record)
    with new_folder(out) as folder:
        shutil.copyfile(record, folder / record.name)
        plots = draw_diagnosis(content, folder)
        (folder / DIAGNOSIS_TEXT).write_text(diagnosis_to_markdown(content, plots), "utf-8")


def require_choice(content: Mapping[str, Any]) -> None:
    """Raises BehaviourError, naming the nearest layer, if the rule found no layer admissible."""
    choice = content["choice"]
    if choice["layers"]:
        return
    limit = content["section"]["divergence"]
    whole = [row for row in choice["evidence"] if row["divergence"] <= limit]
    near = max(whole or choice["evidence"], key=lambda row: row["cause"]["low"])
    cause = near["cause"]
    raise BehaviourError(
        found=f"no admissible layer; nearest is layer {near['layer']}: {cause['value']:.3g} "
        f"[{cause['low']:.3g}, {cause['high']:.3g}], divergence {near['divergence']:.3g}",
        expected="an FFN on which refusals depend, in a model that stays whole",
        where="the choice of layers",
        remedy="trace more prompts, or decide by another kind of ablation",
    )


def _choice_curves(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    return {
        "cause": [(row["layer"], row["cause"]["value"]) for row in rows],
        "separability": [(row["layer"], row["separability"]) for row in rows],
    }


def _rounded(row: Mapping[str, Any]) -> dict[str, Any]:
    cause = {name: round(value, 6) for name, value in row["cause"].items()}
    return {
        **row,
        "cause": cause,
        "divergence": round(row["divergence"], 6),
        "separability": round(row["separability"], 6),
    }
