"""The modality gap: how far apart one prompt's forms lie, beside how far apart the labels lie."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np

from guardbake.activations import Activations
from guardbake.covariance import Matrix
from guardbake.report.blocks import Grid
from guardbake.report.plots import Cloud, Clouds, Curve, Curves, Plot
from guardbake.samples import FORMS
from guardbake.site import Site
from guardbake.studies.probes import components
from guardbake.studies.setting import Figures, Setting, Study, of_form

_PAIRS = tuple(combinations(FORMS, 2))
_PICTURES = 3


def measure(setting: Setting) -> Figures:
    """Gaps, shifts and their directions after every studied layer, and a few layers' clouds."""
    prompts = setting.prompts("fit")

    def found() -> Figures:
        rows = setting.rows(prompts, FORMS)
        reports = [
            {"layer": site.layer} | _gaps(rows, table.astype(np.float64))
            for site, table in rows.last.items()
        ]
        chosen = np.linspace(0, len(setting.layers) - 1, _PICTURES).round().astype(int)
        shown = sorted({setting.layers[n] for n in chosen})
        return {
            "rows": reports,
            "pictures": {str(layer): _picture(rows, layer) for layer in shown},
        }

    return setting.kept("modality", prompts, found)


def _gaps(rows: Activations, table: Matrix) -> dict[str, Any]:
    """Distances of means in units of the spread: the root mean square distance of rows of one form
    and label from their own mean. Offsets: of a form's harmless mean from the text's, along the
    text's direction to harmful, which is what misplaces a threshold."""
    harmful = rows.where(lambda s: s.label == "harmful")
    means, shifts, harmless, spreads = {}, {}, {}, []
    for form in FORMS:
        own = of_form(rows, form)
        centres = [table[own & which].mean(axis=0) for which in (harmful, ~harmful)]
        means[form] = (centres[0] + centres[1]) / 2
        shifts[form], harmless[form] = centres[0] - centres[1], centres[1]
        for which, centre in zip((harmful, ~harmful), centres, strict=True):
            spreads.append(((table[own & which] - centre) ** 2).sum(1).mean())
    spread = float(np.sqrt(np.mean(spreads))) or 1.0
    along = shifts["text"] / (float(np.linalg.norm(shifts["text"])) or 1.0)
    lengths = {form: float(np.linalg.norm(shift)) for form, shift in shifts.items()}
    return {
        "gaps": {
            f"{a} to {b}": float(np.linalg.norm(means[a] - means[b])) / spread for a, b in _PAIRS
        },
        "shifts": {form: length / spread for form, length in lengths.items()},
        "offsets": {
            form: float((harmless[form] - harmless["text"]) @ along) / spread
            for form in FORMS
            if form != "text"
        },
        "alike": {
            f"{a} and {b}": float(shifts[a] @ shifts[b]) / ((lengths[a] * lengths[b]) or 1.0)
            for a, b in _PAIRS
        },
    }


def _picture(rows: Activations, layer: int) -> dict[str, Any]:
    """Two principal components of all rows together, by form and label."""
    points = components(rows.last[Site(layer, "residual")].astype(np.float64), 2).round(6)
    harmful = rows.where(lambda s: s.label == "harmful")
    return {
        f"{form}, {label}": points[of_form(rows, form) & which].T.tolist()
        for form in FORMS
        for label, which in (("harmful", harmful), ("harmless", ~harmful))
    }


def finding(figures: Figures) -> list[str]:
    """How the gap compares with the labels' shift, and whether the shift keeps its direction."""
    rows = figures["rows"]
    said = []
    for name in rows[0]["gaps"]:
        widest = max(rows, key=lambda row: (row["gaps"][name], -row["layer"]))
        said.append(
            f"{name}: the gap is widest after layer {widest['layer']}, "
            f"{widest['gaps'][name]:.2f} spreads, and {rows[-1]['gaps'][name]:.2f} after layer "
            f"{rows[-1]['layer']}."
        )
    for form in rows[0]["offsets"]:
        most = max(rows, key=lambda row: (abs(row["offsets"][form]), -row["layer"]))
        part = most["offsets"][form] / (most["shifts"]["text"] or 1.0)
        said.append(
            f"Harmless {form} prompts lie farthest from harmless text ones along the text's "
            f"direction to harmful after layer {most['layer']}: {most['offsets'][form]:+.2f} "
            f"spreads, {part:+.2f} of the way. A threshold set halfway on text "
            f"{_misplaced(part)}"
        )
    name = "text and typographic"
    best = max(rows, key=lambda row: (row["alike"][name], -row["layer"]))
    said.append(
        f"The shift from harmless to harmful points most alike in text and in typographic images "
        f"after layer {best['layer']}: cosine {best['alike'][name]:.2f}; as text it is "
        f"{best['shifts']['text']:.2f} spreads long there, as image "
        f"{best['shifts']['typographic']:.2f}."
    )
    return said


def _misplaced(part: float) -> str:
    if part >= 0.5:
        return "would open for most of them."
    return f"stands {0.5 - part:.2f} of the way above them instead of 0.50."


def table(figures: Figures) -> Grid:
    rows = figures["rows"]
    names = {"gaps": "gap", "shifts": "shift", "offsets": "offset", "alike": "cosine"}
    columns = [(part, name) for part in names for name in rows[0][part]]
    return Grid(
        "Residual at the last prompt token. Gaps: between the means of two forms; shifts: between "
        "harmful and harmless of one form; both in spreads, the root mean square distance of rows "
        "from the mean of their form and label. Offsets: of harmless prompts from harmless text "
        "ones, along the text's shift. Cosine: between two forms' shifts.",
        ("layer", *(f"{names[part]}, {name}" for part, name in columns)),
        [
            (str(row["layer"]), *(f"{row[part][name]:.2f}" for part, name in columns))
            for row in rows
        ],
    )


def plots(figures: Figures) -> list[Plot]:
    """The clouds of a few layers, and gaps, shifts and cosines over layers."""
    clouds = {
        f"layer {layer}": [Cloud(name, *points) for name, points in picture.items()]
        for layer, picture in figures["pictures"].items()
    }
    rows = figures["rows"]
    x = [row["layer"] for row in rows]
    panels = {
        title: [Curve(name, x, [row[part][name] for row in rows]) for name in rows[0][part]]
        for part, title in (("gaps", "between forms"), ("shifts", "harmful to harmless"))
    }
    alike = [Curve(name, x, [row["alike"][name] for row in rows]) for name in rows[0]["alike"]]
    return [
        Clouds("clouds", clouds, "first component", "second component"),
        Curves("gaps", panels, "layer", "distance of means, spreads"),
        Curves("alike", {"harmful to harmless": alike}, "layer", "cosine"),
    ]


MODALITY = Study(
    "How far apart do the forms of one prompt lie, and does harm point the same way in each?",
    measure,
    finding,
    table,
    plots,
)
