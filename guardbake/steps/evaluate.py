"""The evaluation: arms by families, every cell a stage of its own, so that a cut run goes on."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from guardbake.bundle.canonical import JSON
from guardbake.errors import RecipeError
from guardbake.evaluate.arms import UNDEFENDED, Arm
from guardbake.evaluate.drift import cost
from guardbake.evaluate.judges import KeywordJudge
from guardbake.evaluate.table import GREEDY, Group, table_of
from guardbake.recipe import Recipe
from guardbake.recipe_evaluate import EvaluateSection
from guardbake.samples import SENSED, Sample
from guardbake.samples.typography import Tokenizer
from guardbake.spec import GuardSpec
from guardbake.steps.families import Column, columns
from guardbake.steps.fit import SENSOR_FORMS
from guardbake.steps.judging import Judging
from guardbake.steps.records import read_record, write_record
from guardbake.steps.searches import Searches
from guardbake.steps.split import Splits
from guardbake.steps.staging import Advance, Stages
from guardbake.steps.utility import benchmarks, scored
from guardbake.vlm.behaviour import Drift, Questions
from guardbake.vlm.load import Vlm
from guardbake.vlm.low_rank import LowRank
from guardbake.vlm.requests import Asking, Typography
from guardbake.vlm.sampling import Sampling
from guardbake.vlm.tokens import Request

Runs = dict[str, list[str]]
"""Answers, one a prompt, by the name of the run."""


def arms_of(
    section: EvaluateSection,
    fitted: GuardSpec,
    candidates: Mapping[str, GuardSpec],
    tuned: LowRank | None,
) -> list[Arm]:
    """The undefended model, the recipe's arms and, if asked for, every candidate.

    tuned: for the arms that ask for it. Raises RecipeError for a guard that the fit stage did not
    try or that needs its gate, and UsageError as `Arm` does.
    """
    arms = [Arm(UNDEFENDED)]
    for row in section.arms:
        known = {"fitted": fitted, **candidates}
        if row.guard is not None and row.guard not in known:
            raise RecipeError(
                found=f"the guard {row.guard!r}",
                expected=f"one of {', '.join(known)}",
                where=f"section evaluate.arms, {row.name!r}",
                remedy="name a candidate as fit.json names it",
            )
        spec = None if row.guard is None else known[row.guard]
        if spec is not None and row.ungated:
            spec = _without_gate(spec, row.name)
        change = tuned if row.tuned else None
        arms.append(Arm(row.name, spec, row.canned, row.preamble, change))
    if section.candidates:
        arms += [Arm(name, spec) for name, spec in candidates.items()]
    unknown = set(section.pgd.through if section.pgd else ()) - {arm.name for arm in arms}
    if unknown:
        raise RecipeError(
            found=f"no arm named {', '.join(sorted(unknown))}",
            expected=f"one of {', '.join(arm.name for arm in arms)}",
            where="section evaluate.pgd, through",
            remedy="name arms of the table",
        )
    if len({arm.name for arm in arms}) < len(arms):
        raise RecipeError(
            found="an arm with the name of a candidate",
            expected="a name for every row",
            where="section evaluate.arms",
            remedy="rename the arm",
        )
    return arms


def _without_gate(spec: GuardSpec, arm: str) -> GuardSpec:
    """The same edits on every token."""
    if any(edit.kind == "replace" for edit in spec.edits):
        raise RecipeError(
            found="an edit replace without a gate",
            expected="a gate: the pass over the text alone goes through the same edits",
            where=f"section evaluate.arms, {arm!r}",
            remedy="leave ungated out, or name another guard",
        )
    edits = tuple(replace(edit, gate=0) for edit in spec.edits)
    return replace(spec, profile="always", sensors=(), edits=edits)


class Evaluation:
    """One evaluation on its way."""

    def __init__(
        self,
        vlm: Vlm,
        recipe: Recipe,
        root: Path,
        splits: Splits,
        typography: Typography,
        arms: Sequence[Arm],
        stages: Stages,
        advance: Advance,
    ) -> None:
        assert recipe.evaluate is not None
        self.section = recipe.evaluate
        self._about = {
            "recipe": recipe.name,
            "samples": dict(splits.digests),
            "fitted_on": list(splits.forms(SENSOR_FORMS)),
            "validated_on": list(splits.forms(SENSED)),
        }
        self._vlm = vlm
        self._arms = arms
        self._stages = stages
        self._advance = advance
        self._size = recipe.batch_size
        self._questions: dict[str, Questions] = {}
        self._column: Column | None = None
        self._made: dict[str, _Given] = {}
        self._judges = [Judging(judge, root, stages) for judge in self.section.judges]
        self.searches = Searches(vlm, recipe, splits, root, typography, stages, advance)
        self.columns = columns(
            self.section, splits.prompts["test"], typography, root, splits.imageless
        )
        self.columns += self.searches.columns()
        self._benchmarks = benchmarks(self.section, splits, typography, root)

    def run(self) -> dict[str, Any]:
        """The table, what harmless answers and tasks cost and what the searches found, as JSON
        values: see `evaluate.writeup`."""
        groups = [self._group(column) for column in self.columns]
        table = table_of(groups)
        return {
            **self._about,
            "model": self._vlm.model_digest,
            "arms": [arm.record for arm in self._arms],
            "settings": self.section.model_dump(mode="json"),
            "table": table.to_json(),
            "markdown": table.to_markdown(),
            "judges": [self._judged(judge, groups) for judge in self._judges],
            "costs": self._costs(),
            "utility": self._utility(),
            "searches": self.searches.report(),
        }

    # -- answers -----------------------------------------------------------------------------

    def _group(self, column: Column) -> Group:
        verdicts = {}
        for arm in filter(column.asks, self._arms):
            runs = self._answers(arm, arm, column)
            verdicts[arm.name] = {
                run: KeywordJudge().judge(column.samples, texts) for run, texts in runs.items()
            }
        return Group(column.label, column.family, column.prompts, verdicts)

    def _judged(self, judge: Judging, groups: Sequence[Group]) -> dict[str, Any]:
        """The greedy answers to harmful prompts again, as a model judges them."""
        judged, keywords = [], []
        for column, group in zip(self.columns, groups, strict=True):
            if column.label != "harmful":
                continue
            verdicts = {}
            for arm in filter(column.asks, self._arms):
                texts = self._answers(arm, arm, column)[GREEDY]
                verdicts[arm.name] = {GREEDY: judge.verdicts(column.samples, texts)}
            judged.append(replace(group, verdicts=verdicts))
            keywords.append(group)
        return judge.report(judged, keywords)

    def _answers(self, arm: Arm, asked: Arm, column: Column) -> Runs:
        """What `arm` answers to the column as it is put to `asked`; a stage of its own."""
        given = self._given(column, asked)
        section = self.section
        runs = {GREEDY: None} | {
            f"seed {seed}": Sampling(seed, section.temperature, section.top_p)
            for seed in (section.seeds if column.sampled else ())
        }
        key: dict[str, JSON] = {
            "model": self._vlm.model_digest,
            "arm": arm.key,
            "requests": given.digest,
            "tokens": section.tokens,
            "runs": list(runs),
            "sampling": [section.temperature, section.top_p],
            **self._stages.versions("answers"),
        }

        def build(folder: Path) -> None:
            said: Runs = {}
            for run, sampling in runs.items():
                what = f"{arm.name}: {column.family}, {run}"
                plain = partial(self._plain, arm, asked, column, run)
                questions = self._asked(given, arm)
                said[run] = arm.answers(
                    questions, section.tokens, sampling, plain, partial(self._advance, what)
                )
            write_record(folder / "answers.json", {"runs": said})

        record = read_record(self._stages.stage("answers", key, build) / "answers.json")
        return {run: record["runs"][run] for run in runs}

    def _plain(self, arm: Arm, asked: Arm, column: Column, run: str) -> list[str]:
        """What the model answers without the arm's guard to what the arm is asked."""
        return self._answers(Arm(UNDEFENDED), asked, column)[run]

    def _given(self, column: Column, arm: Arm) -> _Given:
        """The column's requests as they are put to the arm, made once while a column lasts."""
        if column is not self._column:
            self._column, self._made = column, {}
        asker = str(arm.key) if column.adaptive else arm.preamble
        if asker not in self._made:
            self._made[asker] = _Given.of(column, arm, self._vlm.processor.tokenizer)
        return self._made[asker]

    def _asked(self, given: _Given, arm: Arm) -> Questions:
        """The requests read in by the arm's model, kept for as long as nobody asks others."""
        key = f"{given.digest} {arm.key['tuned']}"
        if key not in self._questions:
            self._questions.clear()
            self._questions[key] = Questions(
                self._vlm,
                given.samples,
                given,
                self._size,
                lambda done, total: self._advance("reading", done, total),
                change=arm.tuned,
            )
        return self._questions[key]

    # -- costs -------------------------------------------------------------------------------

    def _costs(self) -> list[dict[str, Any]]:
        """Perplexity and divergence of every arm that has a distribution, family by family."""
        found = []
        for column in (c for c in self.columns if c.label == "harmless"):
            undefended = self._drift(Arm(UNDEFENDED), column)
            for arm in (a for a in self._arms if a.canned is None):
                drift = self._drift(arm, column)
                found.append(cost(arm.name, column.family, drift, undefended).to_json())
        return found

    def _utility(self) -> list[dict[str, Any]]:
        """Every arm's score on every benchmark."""
        return scored(
            [
                (one, {arm.name: self._answers(arm, arm, one.column)[GREEDY] for arm in self._arms})
                for one in self._benchmarks
            ]
        )

    def _drift(self, arm: Arm, column: Column) -> Drift:
        given, plain = self._given(column, arm), self._given(column, Arm(UNDEFENDED))
        key: dict[str, JSON] = {
            "model": self._vlm.model_digest,
            "arm": arm.key,
            "requests": [given.digest, plain.digest],
            "tokens": self.section.tokens,
            **self._stages.versions("drift"),
        }

        def build(folder: Path) -> None:
            undefended = self._asked(plain, Arm(UNDEFENDED))
            same = given.digest == plain.digest and arm.tuned is None
            questions = undefended if same else self._asked(given, arm)
            progress = partial(self._advance, f"{arm.name}: forced answers, {column.family}")
            drift = arm.drift(questions, undefended, self.section.tokens, progress)
            assert drift is not None
            rows = {name: array.tolist() for name, array in drift._asdict().items()}
            write_record(folder / "drift.json", rows)

        record = read_record(self._stages.stage("drift", key, build) / "drift.json")
        return Drift(*(np.array(record[name]) for name in Drift._fields))


@dataclass(frozen=True, eq=False)
class _Given:
    """The requests of one column, made once: an `Asking` that only looks them up."""

    samples: Sequence[Sample]
    requests: Mapping[Sample, Request]
    digest: str

    @staticmethod
    def of(column: Column, arm: Arm, tokenizer: Tokenizer) -> _Given:
        asking: Asking = arm.asking(column.asking(arm))
        requests = {sample: asking.request(sample, tokenizer) for sample in column.samples}
        state = hashlib.sha256()
        for sample, (text, image) in requests.items():
            name = f"{sample.form}:{sample.family}:{sample.source}:{sample.index}"
            shown = b"" if image is None else repr(image.size).encode() + image.tobytes()
            for part in (name.encode(), text.encode(), shown):
                state.update(hashlib.sha256(part).digest())
        return _Given(column.samples, requests, state.hexdigest())

    def request(self, sample: Sample, _tokenizer: Tokenizer) -> Request:
        return self.requests[sample]
