"""Where an edit works: the same edit at strength 1, layer after layer, its gate open for all."""

from __future__ import annotations

from functools import partial
from typing import Any

from guardbake.recipe import CandidateSection
from guardbake.report.blocks import Grid
from guardbake.report.plots import Curve, Curves, Plot
from guardbake.steps.fit import FIT_FORMS
from guardbake.studies.guards import always_open, fitted_guards, shares
from guardbake.studies.setting import Asked, Figures, Setting, Study

_LABELS = ("harmful", "harmless")
Row = dict[str, Any]


def measure(setting: Setting) -> Figures:
    """Refused and degenerate shares of the validate split, by edit and layer."""
    prompts = setting.prompts("validate")
    asked = {
        label: setting.asked([p for p in prompts if p.label == label], FIT_FORMS)
        for label in _LABELS
    }
    rows = []
    for edit in setting.section.edits:
        section = _section(setting, edit)
        guards = fitted_guards(setting, [section], partial(always_open, setting), "open")
        for layer, (name, spec) in zip(setting.layers, guards.items(), strict=True):
            found = _shares(asked, name, spec, setting.section.seed)
            rows.append({"edit": edit, "layer": layer} | found)
    return {
        "undefended": _shares(asked, "undefended", None, setting.section.seed),
        "rows": rows,
        "budget": setting.bake.recipe.fit.harmless_rise,
        "edited": sorted({n for c in setting.bake.recipe.fit.candidates for n in c.layers}),
    }


def _section(setting: Setting, edit: str) -> CandidateSection:
    """The recipe's own section of that edit at every layer, or a plain one."""
    wanted = {"layers": setting.layers, "strengths": [1.0], "together": False}
    for own in setting.bake.recipe.fit.candidates:
        if own.edit == edit:
            return own.model_copy(update=wanted)
    return CandidateSection.model_validate(
        {"edit": edit, "layers": setting.layers, "strengths": [1.0]}
    )


def _shares(asked: dict[str, Asked], name: str, spec: Any, seed: int) -> Row:
    out: Row = {"degenerate": 0.0}
    for label, one in asked.items():
        verdicts = one.verdicts(f"{name}, {label}", spec)
        out[label] = shares(one, verdicts, "refused", seed).to_json()
        degenerate = shares(one, verdicts, "degenerate", seed).over_forms.value
        out["degenerate"] = max(out["degenerate"], degenerate)
    return out


def finding(figures: Figures) -> list[str]:
    """For each edit the layer where it raises refusals most, with and without the budget."""
    before = figures["undefended"]
    said = []
    for edit in dict.fromkeys(row["edit"] for row in figures["rows"]):
        rows = [row for row in figures["rows"] if row["edit"] == edit]
        best = max(rows, key=lambda row: (_rise(row, before, "harmful"), -row["layer"]))
        if _rise(best, before, "harmful") <= 0:
            said.append(f"{edit}: at no layer does it raise refusal of harmful prompts.")
            continue
        said.append(
            f"{edit}: raises refusal of harmful prompts most at layer {best['layer']}, to "
            f"{_shown(best['harmful'])} from {_shown(before['harmful'])}; harmless prompts there: "
            f"{_shown(best['harmless'])} from {_shown(before['harmless'])}."
        )
        kept = [row for row in rows if _rise(row, before, "harmless") <= figures["budget"]]
        useful = [row["layer"] for row in kept if _rise(row, before, "harmful") > 0]
        listed = ", ".join(map(str, useful)) or "none"
        said.append(
            f"{edit}, without any gate: layers that raise it within {figures['budget']:g} more "
            f"harmless refusals: {listed}, of {len(rows)} looked at."
        )
    return said


def _rise(row: Row, before: Row, label: str) -> float:
    return float(row[label]["value"] - before[label]["value"])


def _shown(value: dict[str, float]) -> str:
    return f"{value['value']:.2f} [{value['low']:.2f}, {value['high']:.2f}]"


def table(figures: Figures) -> Grid:
    forms = list(figures["undefended"]["harmful"]["by_form"])
    undefended = {"edit": "undefended", "layer": "-"} | figures["undefended"]
    return Grid(
        "Share refused, edit at strength 1, gate open for every prompt; 95 % over prompts.",
        (
            "edit",
            "layer",
            *_LABELS,
            *(f"{label} {form}" for label in _LABELS for form in forms),
            "degenerate",
        ),
        [
            (
                row["edit"],
                str(row["layer"]),
                *(_shown(row[label]) for label in _LABELS),
                *(f"{row[label]['by_form'][form]:.2f}" for label in _LABELS for form in forms),
                f"{row['degenerate']:.2f}",
            )
            for row in (undefended, *figures["rows"])
        ],
    )


def plots(figures: Figures) -> list[Plot]:
    """Refused share over layers for both labels; the layers of the recipe's candidates marked."""
    panels: dict[str, list[Curve]] = {}
    layers = sorted({row["layer"] for row in figures["rows"]})
    for label in _LABELS:
        curves = []
        for edit in dict.fromkeys(row["edit"] for row in figures["rows"]):
            rows = [row for row in figures["rows"] if row["edit"] == edit]
            y, low, high = ([row[label][k] for row in rows] for k in ("value", "low", "high"))
            curves.append(Curve(edit, [row["layer"] for row in rows], y, low, high))
        flat = [figures["undefended"][label]["value"]] * len(layers)
        panels[f"{label} prompts"] = [*curves, Curve("undefended", layers, flat)]
    marked = [layer for layer in figures["edited"] if layer in layers]
    return [Curves("layers", panels, "layer", "share refused", marked)]


LAYERS = Study(
    "At which layer does an edit of strength 1 raise refusals, and what does it do to harmless "
    "prompts there?",
    measure,
    finding,
    table,
    plots,
)
