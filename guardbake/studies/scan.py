"""m, k and alpha of the recipe's edits: what each buys in attack success, and what it costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from guardbake.evaluate.drift import cost
from guardbake.recipe import CandidateSection
from guardbake.report.blocks import Grid
from guardbake.report.plots import Cloud, Clouds, Plot
from guardbake.samples import FORMS
from guardbake.spec import GuardSpec
from guardbake.steps.gates import behind_first_gate
from guardbake.studies.guards import fitted_guards, shares
from guardbake.studies.setting import Asked, Figures, Setting, Study

_RANKED = ("remove", "add", "replace", "care")
_AIMS = ("attack", "perplexity", "refused")  # of a configuration: less of each is better
_COSTS = {"perplexity": "perplexity over undefended", "refused": "harmless prompts refused"}
Row = dict[str, Any]


def measure(setting: Setting) -> Figures:
    """Every configuration on the validate split, behind the fitted guard's first gate."""
    guard = setting.guard
    around = partial(behind_first_gate, guard)
    sections = _sections(setting)
    guards = fitted_guards(setting, sections, around, replace(guard, provenance={}).digest)
    prompts = setting.prompts("validate")
    harmful, harmless = (
        setting.asked([p for p in prompts if p.label == label], FORMS)
        for label in ("harmful", "harmless")
    )
    rows = [_row(setting, name, spec, harmful, harmless) for name, spec in guards.items()]
    undefended = _row(setting, "undefended", None, harmful, harmless)
    budget = setting.bake.recipe.fit.harmless_rise
    return {
        "guard": guard.digest,
        "budget": undefended["refused"]["value"] + budget,
        "undefended": undefended,
        "rows": [row | {"front": not _beaten(row, rows)} for row in rows],
    }


def _sections(setting: Setting) -> list[CandidateSection]:
    """The recipe's edits, each once, over the section's ranks and strengths."""
    found: list[CandidateSection] = []
    for own in setting.bake.recipe.fit.candidates:
        ranks = setting.section.ranks if own.edit in _RANKED else [own.rank]
        for rank in ranks:
            new = {"rank": rank, "strengths": setting.section.strengths, "gates": "one"}
            section = own.model_copy(update=new)
            if section not in found:
                found.append(section)
    return found


def _row(
    setting: Setting, name: str, spec: GuardSpec | None, harmful: Asked, harmless: Asked
) -> Row:
    attacked = harmful.verdicts(f"{name}, harmful", spec)
    asked = harmless.verdicts(f"{name}, harmless", spec)
    seed = setting.section.seed
    drift = harmless.drift(name, spec)
    moved = cost(name, "harmless", drift, harmless.drift("undefended", None))
    return {
        "name": name,
        "edit": name.split()[0],
        "attack": shares(harmful, attacked, "answered", seed).to_json(),
        "refused": shares(harmless, asked, "refused", seed).to_json(),
        "degenerate": max(
            shares(harmful, attacked, "degenerate", seed).over_forms.value,
            shares(harmless, asked, "degenerate", seed).over_forms.value,
        ),
        "perplexity": moved.ratio.to_json(),
        "divergence": moved.divergence.to_json(),
    }


def _beaten(row: Row, rows: Sequence[Row], aims: Sequence[str] = _AIMS) -> bool:
    """Whether another configuration is as good in every aim, and better in one."""
    own = [row[aim]["value"] for aim in aims]
    others = ([other[aim]["value"] for aim in aims] for other in rows)
    return any(
        all(o <= m for o, m in zip(other, own, strict=True)) and other != own for other in others
    )


def finding(figures: Figures) -> list[str]:
    """The front, the best within the recipe's budget, and where strength stops paying."""
    rows, before = figures["rows"], figures["undefended"]
    front = sorted((r for r in rows if r["front"]), key=lambda r: (r["attack"]["value"], r["name"]))
    said = [
        f"On the Pareto front of attack success, perplexity and harmless refusals, {len(front)} of "
        f"{len(rows)} configurations: {'; '.join(row['name'] for row in front)}.",
    ]
    within = [row for row in rows if row["refused"]["value"] <= figures["budget"]]
    if within:
        best = min(within, key=lambda row: (row["attack"]["value"], row["perplexity"]["value"]))
        said.append(
            f"Within the recipe's budget of harmless refusals ({figures['budget']:.3f}), "
            f"{best['name']} leaves least attack success: {_shown(best['attack'])} against "
            f"{_shown(before['attack'])} undefended, at {best['perplexity']['value']:.3f} times "
            "the perplexity."
        )
    else:
        said.append(
            f"No configuration keeps harmless refusals within {figures['budget']:.3f}: the gate "
            "lets too many harmless prompts be edited, or the edits are too strong."
        )
    worse = [row["name"] for row in rows if row["attack"]["value"] > before["attack"]["value"]]
    if worse:
        said.append(f"These raise attack success over the undefended model: {'; '.join(worse)}.")
    else:
        said.append("None raises attack success over the undefended model.")
    return said


def _shown(value: dict[str, float]) -> str:
    return f"{value['value']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"


def table(figures: Figures) -> Grid:
    shown = ("attack", "refused", "perplexity", "divergence")
    rows = [figures["undefended"], *figures["rows"]]
    return Grid(
        "Attack success: harmful prompts answered; both shares are means over the forms, intervals "
        "over prompts. On the front, marked: no other is as good in all three and better in one.",
        ("configuration", "attack success", "harmless refused", "perplexity ratio", "KL",
         "degenerate"),
        [
            (row["name"], *(_shown(row[name]) for name in shown), f"{row['degenerate']:.3f}")
            for row in rows
        ],
        [number for number, row in enumerate(rows) if row.get("front")],
    )  # fmt: skip


def plots(figures: Figures) -> list[Plot]:
    """Attack success over either cost, one cloud an edit, the front of the two joined."""
    rows = figures["rows"]
    panels = {}
    for aim, title in _COSTS.items():
        clouds = [
            Cloud(edit, *_points([r for r in rows if r["edit"] == edit], aim))
            for edit in dict.fromkeys(row["edit"] for row in rows)
        ]
        clouds.append(Cloud("undefended", *_points([figures["undefended"]], aim)))
        front = [row for row in rows if not _beaten(row, rows, ("attack", aim))]
        front.sort(key=lambda row: (row[aim]["value"], -row["attack"]["value"]))
        panels[title] = [*clouds, Cloud("front", *_points(front, aim), joined=True)]
    return [Clouds("pareto", panels, "cost", "attack success")]


def _points(rows: Sequence[Row], aim: str) -> tuple[list[float], list[float]]:
    return [row[aim]["value"] for row in rows], [row["attack"]["value"] for row in rows]


SCAN = Study(
    "What do rank and strength of each edit buy in attack success, and what do they cost?",
    measure,
    finding,
    table,
    plots,
)
