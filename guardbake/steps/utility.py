"""What every arm scores on the recipe's benchmarks of questions, beside the undefended model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from guardbake.errors import RecipeError
from guardbake.evaluate.statistics import holm, mcnemar_exact
from guardbake.evaluate.utility import Utility, group_of, utility
from guardbake.recipe_evaluate import EvaluateSection
from guardbake.samples.collect import in_forms
from guardbake.samples.digests import identity
from guardbake.samples.questions import Question
from guardbake.samples.readers import read_questions
from guardbake.samples.splits import take
from guardbake.steps.families import DRAW_SEED, Column
from guardbake.steps.split import Splits
from guardbake.vlm.requests import Typography


@dataclass(frozen=True, eq=False)
class Benchmark:
    """questions, and the column that asks them in that order, greedily."""

    source: str
    questions: Sequence[Question]
    column: Column


def benchmarks(
    section: EvaluateSection, splits: Splits, typography: Typography, root: Path
) -> list[Benchmark]:
    """One a source, its groups drawn whole and by content.

    Raises RecipeError for a source that has no questions, that keeps its right answers back, or
    that guard or threshold were fitted on.
    """
    seen = {identity(p) for name in ("fit", "calibrate") for p in splits.prompts[name]}
    found = []
    for source in section.utility:
        questions = _drawn(read_questions(source, root), section.questions)
        fitted = sum(identity(question) in seen for question in questions)
        kept_back = sum(not question.answer for question in questions)
        if fitted or kept_back:
            raise RecipeError(
                found=f"{fitted} questions of the fit or validate split, {kept_back} without answer"
                f" in {source!r}",
                expected="questions with answers, on which nothing was fitted",
                where="section evaluate, utility",
                remedy="take a split that has answers, and leave it out of samples",
            )
        samples = in_forms(questions, ())
        asked = Column("harmless", source, samples, lambda _arm: typography, sampled=False)
        found.append(Benchmark(source, questions, asked))
    return found


def scored(
    asked: Sequence[tuple[Benchmark, Mapping[str, Sequence[str]]]],
) -> list[dict[str, Any]]:
    """A row a benchmark and arm, as JSON values; the first arm is the one the others are paired
    with, group by group.

    asked: each benchmark with every arm's answers. gained: groups that are right under this arm
    alone; lost: under the first alone; p_holm: McNemar's exact test, adjusted for all rows.
    """
    rows: list[dict[str, Any]] = []
    for benchmark, answers in asked:
        found = {arm: utility(benchmark.questions, texts) for arm, texts in answers.items()}
        first = next(iter(found.values()))
        rows += [
            {"benchmark": benchmark.source, "arm": arm, **one.to_json(), **_paired(one, first)}
            for arm, one in found.items()
        ]
    others = [row for row in rows if row["p"] is not None]
    for row, adjusted in zip(others, holm([row["p"] for row in others]), strict=True):
        row["p_holm"] = adjusted
    return rows


def _paired(one: Utility, first: Utility) -> dict[str, Any]:
    right, before = ([score == 1.0 for score in each.groups] for each in (one, first))
    gained = sum(now and not then for now, then in zip(right, before, strict=True))
    lost = sum(then and not now for now, then in zip(right, before, strict=True))
    p = None if one is first else mcnemar_exact(gained, lost)
    return {"gained": gained, "lost": lost, "p": p, "p_holm": None}


def _drawn(questions: Sequence[Question], limit: int) -> list[Question]:
    """All questions of at most `limit` groups, in their order."""
    groups: dict[str, list[Question]] = {}
    for place, question in enumerate(questions):
        groups.setdefault(group_of(question, place), []).append(question)
    heads = {identity(group[0]): key for key, group in groups.items()}
    drawn = take([group[0] for group in groups.values()], min(limit, len(heads)), DRAW_SEED)
    kept = {heads[identity(head)] for head in drawn}
    return [q for place, q in enumerate(questions) if group_of(q, place) in kept]
