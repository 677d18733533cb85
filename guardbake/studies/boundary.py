"""Is the boundary between harmful and harmless a plane? A linear probe against a kernel probe."""

from __future__ import annotations

from typing import Any

import numpy as np

from guardbake.activations import Activations
from guardbake.covariance import Matrix
from guardbake.diagnose.separability import area_under_curve, folds
from guardbake.report.blocks import Grid
from guardbake.report.plots import Cloud, Clouds, Curve, Curves, Plot
from guardbake.samples import Form
from guardbake.site import Site
from guardbake.steps.fit import FIT_FORMS
from guardbake.studies.probes import (
    cross_fitted,
    gaussian_kernels,
    kernel_components,
    linear_kernels,
)
from guardbake.studies.setting import Figures, Setting, Study, of_form

PROBES = {"linear": linear_kernels, "kernel": gaussian_kernels}
_ROUNDS = 1000


def measure(setting: Setting) -> Figures:
    """Cross-validated areas at every studied layer, and a picture where the kernel gains most."""
    prompts = setting.prompts("fit")

    def found() -> Figures:
        rows = setting.rows(prompts, FIT_FORMS)
        reports = []
        for number, (site, table) in enumerate(rows.last.items()):
            for form in FIT_FORMS:
                reports.append(_compared(setting, rows, site, table.astype(np.float64), form))
            setting.bake.reporter.advance("fitting probes", number + 1, len(rows.last))
        top = max(reports, key=lambda row: (row["gain"]["value"], -row["layer"]))
        return {"rows": reports, "picture": _picture(rows, top["layer"])}

    return setting.kept("boundary", prompts, found)


def _compared(
    setting: Setting, rows: Activations, site: Site, table: Matrix, form: Form
) -> dict[str, Any]:
    own = of_form(rows, form)
    samples = [s for s in rows.samples if s.form == form]
    harmful = np.array([s.label == "harmful" for s in samples])
    fold = folds(samples, setting.section.folds)
    scores = {
        name: cross_fitted(table[own], harmful, fold, kernels) for name, kernels in PROBES.items()
    }
    areas = {name: area_under_curve(s[harmful], s[~harmful]) for name, s in scores.items()}
    return {
        "layer": site.layer,
        "form": form,
        **areas,
        "gain": _gain(scores, harmful, setting.section.seed),
    }


def _gain(scores: dict[str, Matrix], harmful: np.ndarray, seed: int) -> dict[str, float]:
    """Kernel area less linear area, percentile bootstrap over prompts within either label."""
    rng = np.random.default_rng(seed)
    bad, good = np.flatnonzero(harmful), np.flatnonzero(~harmful)
    drawn = []
    for _ in range(_ROUNDS):
        some, other = rng.choice(bad, len(bad)), rng.choice(good, len(good))
        areas = [area_under_curve(scores[n][some], scores[n][other]) for n in ("kernel", "linear")]
        drawn.append(areas[0] - areas[1])
    areas = [area_under_curve(scores[n][bad], scores[n][good]) for n in ("kernel", "linear")]
    low, high = np.quantile(drawn, (0.025, 0.975))
    return {"value": areas[0] - areas[1], "low": float(low), "high": float(high)}


def _picture(rows: Activations, layer: int) -> dict[str, Any]:
    """Two kernel principal components of each form's rows."""
    table, points = rows.last[Site(layer, "residual")].astype(np.float64), {}
    for form in FIT_FORMS:
        own = of_form(rows, form)
        harmful = rows.where(lambda s: s.label == "harmful")[own]
        found = kernel_components(table[own], 2).round(6)
        points[form] = {
            "harmful": found[harmful].T.tolist(),
            "harmless": found[~harmful].T.tolist(),
        }
    return {"layer": layer, "points": points}


def finding(figures: Figures) -> list[str]:
    """Where, if anywhere, the interval of the kernel's gain excludes zero."""
    said = []
    for form in FIT_FORMS:
        rows = [row for row in figures["rows"] if row["form"] == form]
        best = max(rows, key=lambda row: (row["linear"], -row["layer"]))
        top = max(rows, key=lambda row: (row["gain"]["value"], -row["layer"]))
        gained = [row["layer"] for row in rows if row["gain"]["low"] > 0]
        lost = [row["layer"] for row in rows if row["gain"]["high"] < 0]
        said.append(
            f"As {form}: the linear probe is best after layer {best['layer']}, AUC "
            f"{best['linear']:.3f}, the kernel probe there {best['kernel']:.3f}."
        )
        if gained:
            listed = ", ".join(map(str, gained))
            said.append(
                f"As {form} the kernel probe gains beyond its interval after layers {listed}, most "
                f"after layer {top['layer']}: {_shown(top['gain'])}. There the boundary is bent."
            )
        else:
            said.append(
                f"As {form} no layer shows a gain of the kernel probe beyond its interval; the "
                f"largest is {_shown(top['gain'])} after layer {top['layer']}: nothing here speaks "
                "against a plane."
            )
        if lost:
            said.append(f"As {form} it loses after layers {', '.join(map(str, lost))}.")
    said.append(
        f"{len(figures['rows'])} comparisons were made; their intervals are not adjusted for that."
    )
    return said


def _shown(value: dict[str, float]) -> str:
    return f"{value['value']:+.3f} [{value['low']:+.3f}, {value['high']:+.3f}]"


def table(figures: Figures) -> Grid:
    return Grid(
        "Areas under the curve, cross-validated; gain: kernel less linear, 95 % over prompts.",
        ("layer", "form", *PROBES, "gain"),
        [
            (
                str(row["layer"]),
                row["form"],
                *(f"{row[name]:.3f}" for name in PROBES),
                _shown(row["gain"]),
            )
            for row in figures["rows"]
        ],
    )


def plots(figures: Figures) -> list[Plot]:
    """Areas over layers, and the kernel principal components where the kernel gains most."""
    panels = {
        str(form): [
            Curve(name, [row["layer"] for row in rows], [row[name] for row in rows])
            for name in PROBES
        ]
        for form in FIT_FORMS
        for rows in [[row for row in figures["rows"] if row["form"] == form]]
    }
    picture = figures["picture"]
    clouds = {
        f"{form}, layer {picture['layer']}": [
            Cloud(label, *points) for label, points in picture["points"][form].items()
        ]
        for form in FIT_FORMS
    }
    return [
        Curves("auc", panels, "layer", "AUC, cross-validated", base=0.5),
        Clouds("kernel-pca", clouds, "first component", "second component"),
    ]


BOUNDARY = Study(
    "Is the boundary between harmful and harmless prompts a plane, or does a bent one tell more?",
    measure,
    finding,
    table,
    plots,
)
