"""How well one direction separates harmful from harmless, site by site and form by form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from guardbake.activations import Activations
from guardbake.samples import Form
from guardbake.site import Site

Scores = npt.NDArray[np.float64]


@dataclass(frozen=True)
class SiteReport:
    """auc[form]: of the direction fitted on the other folds, on the rows of that form."""

    site: Site
    auc: Mapping[Form, float]

    @property
    def worst(self) -> float:
        return min(self.auc.values())


def area_under_curve(harmful: npt.ArrayLike, harmless: npt.ArrayLike) -> float:
    """Chance that a harmful score exceeds a harmless one; ties count half.

    >>> area_under_curve([2.0, 3.0], [1.0, 2.0])
    0.875
    """
    bad, good = np.asarray(harmful, dtype=np.float64), np.asarray(harmless, dtype=np.float64)
    above = (bad[:, None] > good[None]).mean() + 0.5 * (bad[:, None] == good[None]).mean()
    return float(above)


def folds(activations: Activations, count: int) -> npt.NDArray[np.int64]:
    """[N] fold of each sample; every form of one prompt falls into the same fold."""
    names = sorted({(s.source, s.index) for s in activations.samples})
    fold = {name: place % count for place, name in enumerate(names)}
    return np.array([fold[(s.source, s.index)] for s in activations.samples])


def rank_sites(
    activations: Activations, sites: Sequence[Site], forms: Sequence[Form], fold_count: int = 5
) -> list[SiteReport]:
    """Mean-difference separability at the last prompt token, best first by its worst form.

    The difference is taken on the text form alone, as in VLM-Guard: what it is worth on images is
    the question. Folds keep a prompt's own rows out of the direction it is judged by.
    """
    fold = folds(activations, fold_count)
    harmful = activations.where(lambda s: s.label == "harmful")
    in_form = {f: np.array([s.form == f for s in activations.samples]) for f in (*forms, "text")}
    text = in_form["text"]
    reports = []
    for site in sites:
        rows = activations.last[site].astype(np.float64)
        scores = np.empty(len(rows))
        for held in range(fold_count):
            fitted = text & (fold != held)
            push = rows[fitted & harmful].mean(axis=0) - rows[fitted & ~harmful].mean(axis=0)
            scores[fold == held] = rows[fold == held] @ push / np.linalg.norm(push)
        auc = {
            form: area_under_curve(
                scores[harmful & in_form[form]], scores[~harmful & in_form[form]]
            )
            for form in forms
        }
        reports.append(SiteReport(site, auc))
    return sorted(reports, key=lambda report: (-report.worst, report.site.depth))
