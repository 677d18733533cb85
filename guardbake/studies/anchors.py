"""How many anchor prompts a direction needs, and how much alike they may be.

A direction is fitted on n harmful and n harmless prompts of the fit split, drawn again and again,
and judged on the validate split. How alike the drawn prompts are is steered by the residuals of
their text form: "narrow" takes a prompt and those nearest to it, "spread" the farthest-first
traversal (Gonzalez 1985), "random" any.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from guardbake.activations import Activations
from guardbake.covariance import Matrix
from guardbake.diagnose.separability import area_under_curve, separability
from guardbake.errors import RecipeError
from guardbake.fit.gate import detection_at
from guardbake.fit.subspace import discriminant_direction
from guardbake.report.blocks import Grid
from guardbake.report.plots import Curve, Curves, Plot
from guardbake.site import Site
from guardbake.steps.fit import FIT_FORMS
from guardbake.studies.setting import Figures, Setting, Study, of_form

RATE = "0.05"  # of harmless prompts that open the gate, where its detection is read
_LOTTERY = 0.05  # of AUC between the 5 % and 95 % draws, above which luck decides
Indices = npt.NDArray[np.int64]
Draw = Callable[[Matrix, int, np.random.Generator], Indices]


def random(rows: Matrix, count: int, rng: np.random.Generator) -> Indices:
    """Any `count` rows of [N, d]."""
    return rng.permutation(len(rows))[:count]


def narrow(rows: Matrix, count: int, rng: np.random.Generator) -> Indices:
    """A row and the `count - 1` nearest to it."""
    first = rng.integers(len(rows))
    return np.argsort(((rows - rows[first]) ** 2).sum(1), kind="stable")[:count]


def spread(rows: Matrix, count: int, rng: np.random.Generator) -> Indices:
    """A row, then always the one farthest from all that are chosen."""
    chosen = [int(rng.integers(len(rows)))]
    distance = np.full(len(rows), np.inf)
    while len(chosen) < count:
        distance = np.minimum(distance, ((rows - rows[chosen[-1]]) ** 2).sum(1))
        distance[chosen] = -1
        chosen.append(int(distance.argmax()))
    return np.array(chosen)


DRAWS: Mapping[str, Draw] = {"random": random, "narrow": narrow, "spread": spread}


def measure(setting: Setting) -> Figures:
    """Area under the curve and detection of every draw, at the layer that tells best."""
    fit, held = setting.bake.splits.prompts["fit"], setting.prompts("validate")
    prompts = [p for p in fit if p.image is None and not p.family]

    def found() -> Figures:
        fitting, judged = setting.rows(prompts, FIT_FORMS), setting.rows(held, FIT_FORMS)
        reports = separability(fitting.samples, fitting.last, FIT_FORMS)
        best = max(reports, key=lambda report: (report.worst("auc"), -report.place.depth))
        sizes = _sizes(setting, fitting)
        return {
            "layer": best.place.layer,
            "available": _available(fitting),
            "left_out": sorted(set(setting.section.pairs) - set(sizes)),
            "rows": _rows(setting, fitting, judged, best.place, sizes),
        }

    return setting.kept("anchors", [*prompts, *held], found)


def _available(fitting: Activations) -> int:
    text = [s for s in fitting.samples if s.form == "text"]
    harmful = sum(s.label == "harmful" for s in text)
    return min(harmful, len(text) - harmful)


def _sizes(setting: Setting, fitting: Activations) -> list[int]:
    sizes = sorted(n for n in setting.section.pairs if n <= _available(fitting))
    if not sizes:
        raise RecipeError(
            found=f"{_available(fitting)} pairs of prompts in the fit split",
            expected=f"at least {min(setting.section.pairs)}",
            where="section study.pairs",
            remedy="add prompts to samples.fit, or ask for fewer pairs",
        )
    return sizes


def _rows(
    setting: Setting, fitting: Activations, judged: Activations, site: Site, sizes: Sequence[int]
) -> list[dict[str, Any]]:
    table = fitting.last[site].astype(np.float64)
    text = fitting.where(lambda s: s.form == "text")
    harmful = fitting.where(lambda s: s.label == "harmful")
    pools = [np.flatnonzero(text & which) for which in (harmful, ~harmful)]
    # in_forms goes form by form: the same prompt stands one block later in the next form
    block = int(text.sum())
    held = judged.last[site].astype(np.float64)
    rows = []
    for kind, draw in DRAWS.items():
        for size in sizes:
            found = []
            for number in range(setting.section.draws):
                rng = np.random.default_rng([setting.section.seed, size, number])
                bad, good = (pool[draw(table[pool], size, rng)] for pool in pools)
                direction = _direction(table, bad, good, block, setting.section.ridge)
                found.append(_judged(held @ direction, judged))
            rows.append({"kind": kind, "pairs": size} | _summed(found))
            setting.bake.reporter.advance("drawing anchors", len(rows), len(DRAWS) * len(sizes))
    return rows


def _direction(table: Matrix, bad: Indices, good: Indices, block: int, ridge: float) -> Matrix:
    count = len(FIT_FORMS)
    both = [np.concatenate([rows + form * block for form in range(count)]) for rows in (bad, good)]
    groups = np.concatenate([np.repeat(np.arange(count), len(rows)) for rows in (bad, good)])
    return discriminant_direction(table[both[0]], table[both[1]], groups, ridge)


def _judged(scores: Matrix, judged: Activations) -> dict[str, tuple[float, float]]:
    """(area, detection) by form."""
    harmful = judged.where(lambda s: s.label == "harmful")
    out = {}
    for form in FIT_FORMS:
        own = of_form(judged, form)
        bad, good = scores[own & harmful], scores[own & ~harmful]
        out[str(form)] = area_under_curve(bad, good), detection_at(bad, good)[RATE]
    return out


def _summed(found: Sequence[Mapping[str, tuple[float, float]]]) -> dict[str, Any]:
    """Median and 5 % to 95 % of the draws, by measure and form."""
    out: dict[str, Any] = {}
    for place, name in enumerate(("auc", "detection")):
        out[name] = {}
        for form in FIT_FORMS:
            low, middle, high = np.quantile([one[form][place] for one in found], (0.05, 0.5, 0.95))
            out[name][form] = {"value": float(middle), "low": float(low), "high": float(high)}
    return out


def finding(figures: Figures) -> list[str]:
    """From how many pairs on a draw is no lottery, and what alikeness costs at the same number."""
    rows = {(row["kind"], row["pairs"]): row for row in figures["rows"]}
    sizes = sorted({row["pairs"] for row in figures["rows"]})
    said = [f"Judged at the residual after layer {figures['layer']}, on prompts never drawn from."]
    for form in FIT_FORMS:
        first, last = (rows["random", n]["auc"][form] for n in (sizes[0], sizes[-1]))
        steady = [
            n
            for n in sizes
            if all(
                rows["random", m]["auc"][form]["high"] - rows["random", m]["auc"][form]["low"]
                <= _LOTTERY
                for m in sizes
                if m >= n
            )
        ]
        luck = (
            f"from {steady[0]} pairs on, luck moves it by at most {_LOTTERY:g}"
            if steady
            else f"even {sizes[-1]} pairs leave more than {_LOTTERY:g} of it to luck"
        )
        said.append(
            f"As {form}: AUC {_shown(first)} with {sizes[0]} random pairs and {_shown(last)} with "
            f"{sizes[-1]} (median, 5 % to 95 % of the draws); {luck}."
        )
    for form in FIT_FORMS:
        gaps = {
            n: rows["spread", n]["auc"][form]["value"] - rows["narrow", n]["auc"][form]["value"]
            for n in sizes
        }
        size = max(sizes, key=lambda n: abs(gaps[n]))
        better, worse = ("spread", "narrow") if gaps[size] > 0 else ("narrow", "spread")
        if gaps[size]:
            said.append(
                f"As {form}, alikeness matters most with {size} pairs: median AUC "
                f"{rows[better, size]['auc'][form]['value']:.3f} with {better} anchors, "
                f"{rows[worse, size]['auc'][form]['value']:.3f} with {worse} ones."
            )
        else:
            said.append(f"As {form}, narrow and spread anchors give the same median AUC.")
    if figures["left_out"]:
        asked = ", ".join(map(str, figures["left_out"]))
        said.append(f"Not tried, for want of prompts ({figures['available']} pairs): {asked}.")
    return said


def _shown(value: Mapping[str, float]) -> str:
    return f"{value['value']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"


def table(figures: Figures) -> Grid:
    columns = [(form, name) for form in FIT_FORMS for name in ("auc", "detection")]
    return Grid(
        f"Median and 5 % to 95 % of the draws. Detection: harmful prompts above the threshold that "
        f"{float(RATE):.0%} of the harmless ones pass.",
        ("anchors", "pairs", *(f"{name}, {form}" for form, name in columns)),
        [
            (row["kind"], str(row["pairs"]), *(_shown(row[name][form]) for form, name in columns))
            for row in figures["rows"]
        ],
    )


def plots(figures: Figures) -> list[Plot]:
    drawn: list[Plot] = []
    for measured, label in (("auc", "AUC"), ("detection", f"detection at {float(RATE):.0%}")):
        panels = {
            str(form): [
                Curve(
                    kind,
                    [row["pairs"] for row in rows],
                    *([row[measured][form][k] for row in rows] for k in ("value", "low", "high")),
                )
                for kind in DRAWS
                for rows in [[row for row in figures["rows"] if row["kind"] == kind]]
            ]
            for form in FIT_FORMS
        }
        base = 0.5 if measured == "auc" else 0.0
        drawn.append(Curves(measured, panels, "anchor pairs", label, base=base))
    return drawn


ANCHORS = Study(
    "How many anchor pairs does a direction need, and must they differ from one another?",
    measure,
    finding,
    table,
    plots,
)
