"""What every study works with: the recipe's bake, limited prompts, and answers kept as stages."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from guardbake.activations import Activations
from guardbake.bundle.canonical import JSON
from guardbake.errors import RecipeError
from guardbake.evaluate.judges import Verdict, judge
from guardbake.evaluate.table import LABELS
from guardbake.pipeline import Bake
from guardbake.recipe_study import StudySection
from guardbake.report.blocks import Grid
from guardbake.report.plots import Plot
from guardbake.samples import Form, Prompt, Sample
from guardbake.samples.collect import in_forms
from guardbake.samples.splits import take
from guardbake.site import Site
from guardbake.spec import GuardSpec
from guardbake.steps.records import read_record, write_record
from guardbake.vlm.behaviour import Drift, Questions
from guardbake.vlm.capture import capture

Figures = dict[str, Any]


@dataclass(frozen=True)
class Study:
    """One study. measure: the figures, JSON values; everything else is made from them alone.

    finding: what they say, sentence by sentence. table: the figures to read. plots: to look at.
    """

    question: str
    measure: Callable[[Setting], Figures]
    finding: Callable[[Figures], list[str]]
    table: Callable[[Figures], Grid]
    plots: Callable[[Figures], list[Plot]]


class Setting:
    """A bake and the limits of its section [study]."""

    def __init__(self, bake: Bake) -> None:
        self.bake = bake
        self.section = bake.recipe.study or StudySection()

    @cached_property
    def guard(self) -> GuardSpec:
        """The guard that the recipe's fit chooses."""
        return self.bake.fit()[1]

    @cached_property
    def layers(self) -> list[int]:
        """The layers to look at, in order. Raises RecipeError for one the model lacks."""
        count = int(self.bake.vlm.model.config.get_text_config().num_hidden_layers)
        named = sorted(self.section.layers) or list(range(count))
        if named[-1] >= count:
            raise RecipeError(
                found=f"layer {named[-1]}",
                expected=f"layers 0 to {count - 1}, which the model has",
                where="section study.layers",
                remedy="correct the recipe",
            )
        return named

    def plain(self, split: str) -> list[Prompt]:
        """The split's prompts that are words alone, harmful first."""
        return [p for p in self.bake.splits.prompts[split] if p.image is None and not p.family]

    def drawn(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """At most `limit` of them, drawn by content."""
        limit = self.section.limit
        return take(prompts, limit, self.section.seed) if len(prompts) > limit else list(prompts)

    def prompts(self, split: str) -> list[Prompt]:
        """At most `limit` plain prompts of each label, harmful first."""
        plain = self.plain(split)
        return [p for label in LABELS for p in self.drawn([q for q in plain if q.label == label])]

    def asked(self, prompts: Sequence[Prompt], forms: Sequence[Form]) -> Asked:
        return Asked(self.bake, in_forms(prompts, forms), self.section.tokens)

    def rows(self, prompts: Sequence[Prompt], forms: Sequence[Form]) -> Activations:
        """Residuals after the studied layers, at the last prompt token."""
        return capture(
            self.bake.vlm,
            in_forms(prompts, forms),
            [Site(layer, "residual") for layer in self.layers],
            self.bake.typography,
            self.bake.recipe.batch_size,
            partial(self.bake.reporter.advance, "capturing residuals"),
        )

    def kept(self, name: str, prompts: Sequence[Prompt], measure: Callable[[], Figures]) -> Figures:
        """What `measure` returns, done once for these prompts, the section and the model."""
        key: dict[str, JSON] = {
            "study": name,
            "model": self.bake.vlm.model_digest,
            "samples": digest_of_samples(in_forms(prompts, ("text",))),
            "section": self.section.model_dump(mode="json"),
            "typography": self.bake.recipe.samples.typography.model_dump(mode="json"),
            **self.bake.versions("study"),
        }

        def build(folder: Path) -> None:
            write_record(folder / "figures.json", measure())

        return read_record(self.bake.stage("study", key, build) / "figures.json")


class Asked:
    """Samples asked under one guard after another; every answer sheet is a stage of its own."""

    def __init__(self, bake: Bake, samples: Sequence[Sample], tokens: int) -> None:
        self.samples = list(samples)
        self._bake = bake
        self._tokens = tokens

    @cached_property
    def _questions(self) -> Questions:
        return Questions(
            self._bake.vlm,
            self.samples,
            self._bake.typography,
            self._bake.recipe.batch_size,
            partial(self._bake.reporter.advance, "reading"),
        )

    @cached_property
    def _undefended(self) -> list[str]:
        progress = partial(self._bake.reporter.advance, "answers: undefended")
        return self._questions.ask(None, self._tokens, progress)

    def verdicts(self, name: str, spec: GuardSpec | None) -> list[Verdict]:
        """Greedy answers, judged by keywords; one a sample."""

        def measure(progress: Callable[[int, int], None]) -> Figures:
            said = self._undefended
            if spec is not None:
                said = self._questions.ask(spec, self._tokens, progress, undefended=said)
            return {"verdicts": [judge(answer) for answer in said]}

        found: list[Verdict] = self._cell("verdicts", name, spec, measure)["verdicts"]
        return found

    def drift(self, name: str, spec: GuardSpec | None) -> Drift:
        """See `Questions.drift`."""

        def measure(progress: Callable[[int, int], None]) -> Figures:
            found = self._questions.drift(self._questions, spec, self._tokens, progress)
            return {field: values.tolist() for field, values in found._asdict().items()}

        record = self._cell("drift", name, spec, measure)
        return Drift(*(np.array(record[field]) for field in Drift._fields))

    def opens(self, spec: GuardSpec) -> list[bool]:
        """Whether the guard's gate is open at each prompt's last token."""

        def measure(_progress: Callable[[int, int], None]) -> Figures:
            return {"open": [bool(one) for one in self._questions.opens(spec)]}

        found: list[bool] = self._cell("opens", "the gate", spec, measure)["open"]
        return found

    def _cell(
        self,
        what: str,
        name: str,
        spec: GuardSpec | None,
        measure: Callable[[Callable[[int, int], None]], Figures],
    ) -> Figures:
        bake = self._bake
        key: dict[str, JSON] = {
            "what": what,
            "model": bake.vlm.model_digest,
            "guard": None if spec is None else replace(spec, provenance={}).digest,
            "samples": digest_of_samples(self.samples),
            "typography": bake.recipe.samples.typography.model_dump(mode="json"),
            "tokens": self._tokens,
            **bake.versions("study"),
        }

        def build(folder: Path) -> None:
            progress = partial(bake.reporter.advance, f"{what}: {name}")
            write_record(folder / "cell.json", measure(progress))

        return read_record(bake.stage("cell", key, build) / "cell.json")


def digest_of_samples(samples: Sequence[Sample]) -> str:
    """sha256 over form, label, place and words of every sample, in order."""
    state = hashlib.sha256()
    for s in samples:
        for part in (s.form, s.label, s.source, str(s.index), s.prompt):
            state.update(hashlib.sha256(part.encode()).digest())
    return state.hexdigest()


def of_form(rows: Activations, form: Form) -> npt.NDArray[np.bool_]:
    """[N] bool: the samples of that form."""
    return rows.where(lambda sample: sample.form == form)
