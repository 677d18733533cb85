"""How far harmful and harmless stand apart, place by place and form by form.

Four numbers of one cloud of rows against another. None forms a d x d matrix: with N rows each
follows from their N x N inner products.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Generic, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from guardbake.activations import Rows
from guardbake.covariance import Matrix, Ridge, finite_rows, solve_shrunken
from guardbake.errors import MalformedError
from guardbake.samples import Form, Sample, plainest

Scores = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]
Folds = npt.NDArray[np.int64]


class Place(Protocol):
    """Anything rows are captured at; `depth` is the order in which data passes it."""

    @property
    def depth(self) -> int: ...


P = TypeVar("P", bound=Place)


@dataclass(frozen=True)
class Separation:
    """Harmful against harmless rows of one form at one place.

    auc: of the plainest form's mean difference fitted on the other folds; 0.5 is chance.
    silhouette: mean silhouette width of the two classes, in [-1, 1] (Rousseeuw 1987).
    scatter_ratio: tr(S_between) / tr(S_within), from 0.
    mahalanobis: distance between the class means under the shrunken within-class covariance.
    """

    auc: float
    silhouette: float
    scatter_ratio: float
    mahalanobis: float

    def to_json(self) -> dict[str, float]:
        return asdict(self)


@dataclass(frozen=True)
class PlaceReport(Generic[P]):
    """forms[form]: what was seen at `place` in that form."""

    place: P
    forms: Mapping[Form, Separation]

    def worst(self, measure: str) -> float:
        """The smallest of one measure over the forms: a guard must work in all of them."""
        return min(float(getattr(seen, measure)) for seen in self.forms.values())


def separability(
    samples: Sequence[Sample],
    rows: Mapping[P, Rows],
    forms: Sequence[Form],
    ridge: Ridge = "ledoit-wolf",
    fold_count: int = 5,
) -> list[PlaceReport[P]]:
    """Every measure at every place, rows[place] [N, d] one a sample; in order of depth.

    The area's direction is taken on the plainest form alone, as in VLM-Guard: what it is worth on
    images is the question. Raises MalformedError for rows that are not finite, and where a form
    (or a fold of the plainest form) has harmful or harmless samples alone.
    """
    harmful = np.array([s.label == "harmful" for s in samples], dtype=bool)
    words = plainest(samples)
    in_form = {f: np.array([s.form == f for s in samples], dtype=bool) for f in (*forms, words)}
    fold = folds(samples, fold_count)
    for form in forms:
        _require_both(harmful[in_form[form]], f"form {form!r}")
    for held in range(fold_count):
        _require_both(harmful[in_form[words] & (fold != held)], f"form {words!r} without one fold")
    reports = []
    for place in sorted(rows, key=lambda place: place.depth):
        table = finite_rows(rows[place], f"separability at {place}", len(samples))
        scores = _cross_fitted(table, in_form[words], harmful, fold, fold_count)
        seen = {}
        for form in forms:
            own, bad = table[in_form[form]], harmful[in_form[form]]
            score = scores[in_form[form]]
            seen[form] = Separation(
                area_under_curve(score[bad], score[~bad]),
                silhouette(own, bad),
                scatter_ratio(own, bad),
                mahalanobis(own, bad, ridge),
            )
        reports.append(PlaceReport(place, seen))
    return reports


def area_under_curve(harmful: npt.ArrayLike, harmless: npt.ArrayLike) -> float:
    """Chance that a harmful score exceeds a harmless one; ties count half.

    >>> area_under_curve([2.0, 3.0], [1.0, 2.0])
    0.875
    """
    bad, good = np.asarray(harmful, dtype=np.float64), np.asarray(harmless, dtype=np.float64)
    above = (bad[:, None] > good[None]).mean() + 0.5 * (bad[:, None] == good[None]).mean()
    return float(above)


def silhouette(rows: npt.ArrayLike, harmful: npt.ArrayLike) -> float:
    """Mean over rows [N, d] of (b - a) / max(a, b): a the mean distance to the row's own class
    without itself, b to the other class (Rousseeuw 1987); 0 where a class has one row.
    """
    table, bad = _classes(rows, harmful, "silhouette")
    table = table - table.mean(axis=0)  # a large common part would cancel in the distances
    inner = table @ table.T
    size = np.diag(inner)
    distance = np.sqrt(np.clip(size[:, None] + size[None] - 2 * inner, 0.0, None))
    np.fill_diagonal(distance, 0.0)
    widths = np.zeros(len(table))
    for own in (bad, ~bad):
        if own.sum() < 2:
            continue
        inside = distance[np.ix_(own, own)].sum(axis=1) / (own.sum() - 1)
        outside = distance[np.ix_(own, ~own)].mean(axis=1)
        larger = np.maximum(inside, outside)
        widths[own] = np.divide(
            outside - inside, larger, out=np.zeros_like(larger), where=larger > 0
        )
    return float(widths.mean())


def scatter_ratio(rows: npt.ArrayLike, harmful: npt.ArrayLike) -> float:
    """tr(S_between) / tr(S_within) of rows [N, d] in two classes."""
    table, bad = _classes(rows, harmful, "scatter ratio")
    within = float((_within(table, bad) ** 2).sum())
    if within == 0:
        raise _identical("scatter ratio")
    middle = table.mean(axis=0)
    between = sum(
        own.sum() * float(((table[own].mean(axis=0) - middle) ** 2).sum()) for own in (bad, ~bad)
    )
    return float(between) / within


def mahalanobis(rows: npt.ArrayLike, harmful: npt.ArrayLike, ridge: Ridge) -> float:
    """sqrt(D^T S^-1 D): D the difference of the class means of rows [N, d], S the pooled covariance
    within the classes, shrunken (Ledoit-Wolf, or a ridge relative to tr(S) / d).

    With few rows the distance is too large by chance; at the same N it compares places.
    """
    table, bad = _classes(rows, harmful, "Mahalanobis distance")
    shift = table[bad].mean(axis=0) - table[~bad].mean(axis=0)
    solved = solve_shrunken(_within(table, bad), ridge, shift[:, None], "Mahalanobis distance")
    return float(np.sqrt(shift @ solved[:, 0]))


def folds(samples: Sequence[Sample], count: int) -> Folds:
    """[N] fold of each sample; every form of one prompt falls into the same fold."""
    names = sorted({(s.source, s.index) for s in samples})
    fold = {name: place % count for place, name in enumerate(names)}
    return np.array([fold[(s.source, s.index)] for s in samples])


def _cross_fitted(table: Matrix, text: Flags, harmful: Flags, fold: Folds, count: int) -> Scores:
    """[N] scores along the plainest form's mean difference, each from the folds it is not in."""
    scores = np.zeros(len(table))
    for held in range(count):
        fitted = text & (fold != held)
        push = table[fitted & harmful].mean(axis=0) - table[fitted & ~harmful].mean(axis=0)
        length = np.linalg.norm(push)
        if length > 0:  # else nothing to look along: every score the same, an area of a half
            scores[fold == held] = table[fold == held] @ push / length
    return scores


def _classes(rows: npt.ArrayLike, harmful: npt.ArrayLike, where: str) -> tuple[Matrix, Flags]:
    bad = np.asarray(harmful, dtype=bool)
    _require_both(bad, where)
    return finite_rows(rows, where, len(bad)), bad


def _within(table: Matrix, bad: Flags) -> Matrix:
    """Rows without their own class's mean."""
    out = table.copy()
    for own in (bad, ~bad):
        out[own] -= table[own].mean(axis=0)
    return out


def _require_both(harmful: Flags, where: str) -> None:
    if harmful.all() or not harmful.any():
        raise MalformedError(
            found=f"{int(harmful.sum())} harmful of {len(harmful)} samples",
            expected="both labels",
            where=where,
            remedy="give harmful and harmless samples of every form",
        )


def _identical(where: str) -> MalformedError:
    return MalformedError(
        found="rows that are all the same within their class",
        expected="activations that differ from prompt to prompt",
        where=where,
        remedy="check what was captured",
    )
