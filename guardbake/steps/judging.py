"""Model judges beside the keywords: harmful prompts, greedy answers, every cell a stage."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, cast

from guardbake.bundle.canonical import JSON
from guardbake.errors import RecipeError
from guardbake.evaluate.agreement import agreement
from guardbake.evaluate.judges import Verdict
from guardbake.evaluate.model_judge import ModelJudge, known_judges, load_card
from guardbake.evaluate.table import GREEDY, Group, rows_of, wide
from guardbake.recipe_evaluate import JudgeSection
from guardbake.samples import Sample
from guardbake.steps.records import read_record, write_record
from guardbake.steps.staging import Stages
from guardbake.vlm.catalog import models_root
from guardbake.vlm.classifier import NextWord
from guardbake.vlm.files import digest_checkpoint


class Judging:
    """One model judge of a recipe. It is loaded when an answer is not judged yet."""

    def __init__(self, section: JudgeSection, root: Path, stages: Stages) -> None:
        """Raises RecipeError for an unknown card and a missing file or folder."""
        known = section.card in known_judges()
        path = models_root() / "judges" / f"{section.card}.toml" if known else root / section.card
        if not path.is_file():
            raise _refuse(f"the card {section.card!r}", f"{', '.join(known_judges())}, or a file")
        self.card = load_card(path)
        self._folder = root / section.checkpoint
        if not self._folder.is_dir():
            raise _refuse(f"no folder {self._folder}", "the judge's checkpoint")
        self._template = None
        if section.template is not None:
            try:
                self._template = (root / section.template).read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                found = f"no readable {section.template} ({type(error).__name__})"
                raise _refuse(found, "the template of the judge's model card") from error
        self._size = section.batch_size
        self._stages = stages
        self._digest = digest_checkpoint(self._folder)

    @cached_property
    def _judge(self) -> ModelJudge:
        return ModelJudge(self.card, NextWord(self._folder, self._size), self._template)

    def verdicts(self, samples: Sequence[Sample], answers: Sequence[str]) -> list[Verdict]:
        """One an answer, to harmful requests."""
        state = hashlib.sha256()
        for sample, answer in zip(samples, answers, strict=True):
            for text in (sample.request, answer):
                state.update(hashlib.sha256(text.encode()).digest())
        key: dict[str, JSON] = {
            "judge": self.card.model_dump(mode="json"),
            "template": self._template,
            "checkpoint": self._digest,
            "answers": state.hexdigest(),
            **self._stages.versions("judge"),
        }

        def build(folder: Path) -> None:
            write_record(
                folder / "verdicts.json", {"verdicts": self._judge.judge(samples, answers)}
            )

        record = read_record(self._stages.stage("judge", key, build) / "verdicts.json")
        return cast(list[Verdict], record["verdicts"])

    def report(self, judged: Sequence[Group], keywords: Sequence[Group]) -> dict[str, Any]:
        """Its counts, and how far it agrees with the keywords on the same answers."""
        rows = rows_of(judged)
        ours, theirs = ([*_greedy(groups)] for groups in (keywords, judged))
        same = agreement("keyword", ours, self.card.name, theirs)
        return {
            "name": self.card.name,
            "checkpoint": self._digest,
            "rows": [row.to_json() for row in rows],
            "markdown": "\n".join(wide(rows)),
            "agreement": same.to_json(),
            "agreement_markdown": same.to_markdown(),
        }


def _greedy(groups: Sequence[Group]) -> list[Verdict]:
    return [v for group in groups for runs in group.verdicts.values() for v in runs[GREEDY]]


def _refuse(found: str, expected: str) -> RecipeError:
    return RecipeError(
        found=found,
        expected=expected,
        where="section evaluate.judges",
        remedy="correct the recipe, or leave the judge out",
    )
