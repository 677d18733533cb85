"""The behaviour stage: what the guard does to prompts that nothing was fitted on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from guardbake.diagnose.separability import area_under_curve
from guardbake.evaluate.judges import Verdict, judge
from guardbake.evaluate.table import GREEDY, Group, Table, table_of
from guardbake.fit.gate import detection_at
from guardbake.plugins import Runner
from guardbake.recipe import BehaviourSection, RunnersSection
from guardbake.samples import SENSED, Form, Label, Sample
from guardbake.spec import GuardSpec
from guardbake.steps.fit import Advance
from guardbake.steps.split import Splits
from guardbake.vlm.behaviour import Questions
from guardbake.vlm.load import Vlm
from guardbake.vlm.requests import Typography, batches
from guardbake.vlm.runner import end_ids


@dataclass(frozen=True)
class Measured:
    """table: unguarded and guarded answers of the reference. sensed: of a gated guard, what its
    sensors made of the prompts. runners: refusals runner by runner, if the recipe asks for it."""

    table: Table
    sensed: dict[str, Any] | None
    runners: dict[str, Any] | None


def measure(
    vlm: Vlm,
    spec: GuardSpec,
    splits: Splits,
    typography: Typography,
    section: BehaviourSection,
    batch_size: int,
    runner: Runner,
    advance: Advance,
) -> Measured:
    """Every test prompt in every form, unguarded and guarded, greedy, judged by keywords.

    runner: of the exported graph, asked as far as the section says.
    """
    questions = Questions(
        vlm,
        splits.samples("test", SENSED),
        typography,
        batch_size,
        lambda done, total: advance("reading the test split", done, total),
    )
    before = questions.ask(None, section.tokens, partial(advance, "unguarded"))
    tell = partial(advance, "guarded")
    answers = {
        "unguarded": before,
        "guarded": questions.ask(spec, section.tokens, tell, undefended=before),
    }
    groups = [
        Group(
            label,
            form,
            [(questions.samples[i].source, questions.samples[i].index) for i in rows],
            {arm: {GREEDY: [judge(texts[i]) for i in rows]} for arm, texts in answers.items()},
        )
        for (label, form), rows in _by_label_and_form(questions.samples).items()
    ]
    sensed = _sensed(questions.samples, questions.scores(spec)) if spec.sensors else None
    said = [judge(text) for text in answers["guarded"]]
    asked = None
    if section.runners is not None:
        rows = _first(questions.samples, section.runners.limit)
        few = [questions.samples[row] for row in rows]
        texts = answers_of(runner, vlm, few, typography, section.tokens, batch_size, advance)
        verdicts = {"pytorch": [said[row] for row in rows], "onnx": [judge(t) for t in texts]}
        asked = _beside(few, verdicts, section.runners)
    return Measured(table_of(groups), sensed, asked)


def answers_of(
    runner: Runner,
    vlm: Vlm,
    samples: Sequence[Sample],
    typography: Typography,
    tokens: int,
    batch_size: int,
    advance: Advance,
) -> list[str]:
    """What a runner of the exported model answers, greedily, one text a sample."""
    texts: list[str] = []
    ends = sorted(end_ids(vlm))
    for _, batch in batches(vlm, samples, typography, batch_size):
        trace = runner.run(batch, tokens, keep_prefill=False)
        said = [
            ids[:length][~np.isin(ids[:length], ends)].tolist()
            for ids, length in zip(trace.tokens, trace.lengths, strict=True)
        ]
        texts += vlm.processor.tokenizer.batch_decode(said, skip_special_tokens=True)
        advance("the exported graph", len(texts), len(samples))
    return texts


def _first(samples: Sequence[Sample], limit: int) -> list[int]:
    """The first `limit` of each label and form."""
    rows = _by_label_and_form(samples).values()
    return sorted(row for each in rows for row in each[:limit])


def _beside(
    samples: Sequence[Sample], verdicts: dict[str, list[Verdict]], section: RunnersSection
) -> dict[str, Any]:
    """Refusals of each runner by label and form, and how many answers are judged otherwise."""
    refused = {name: [v == "refused" for v in found] for name, found in verdicts.items()}
    rows = [
        {
            "label": label,
            "form": form,
            "total": len(own),
            "refused": {name: sum(said[i] for i in own) for name, said in refused.items()},
        }
        for (label, form), own in _by_label_and_form(samples).items()
    ]
    differing = sum(a != b for a, b in zip(*refused.values(), strict=True))
    return {
        "names": list(verdicts),
        "rows": rows,
        "asked": len(samples),
        "differing": differing,
        **section.model_dump(mode="json"),
    }


def _sensed(samples: Sequence[Sample], scores: npt.NDArray[np.float32]) -> dict[str, Any]:
    """By form: how often the gate opens, and what the score alone can tell apart."""
    rows = _by_label_and_form(samples)
    found: dict[str, Any] = {}
    for form in dict.fromkeys(sample.form for sample in samples):
        bad, good = (scores[rows[label, form]] for label in ("harmful", "harmless"))
        found[form] = {
            "harmful_open_rate": float((bad > 0).mean()),
            "harmless_open_rate": float((good > 0).mean()),
            "auc": area_under_curve(bad, good),
            "detection_at": detection_at(bad, good),
        }
    return found


def _by_label_and_form(samples: Sequence[Sample]) -> dict[tuple[Label, Form], list[int]]:
    rows: dict[tuple[Label, Form], list[int]] = {}
    for place, sample in enumerate(samples):
        rows.setdefault((sample.label, sample.form), []).append(place)
    return rows


def summarise(measured: Measured, section: BehaviourSection) -> dict[str, Any]:
    """The table, the declared budgets and whether the first two hold, as JSON values."""
    table = measured.table
    ratio = _attack_ratio(table)
    asked = {row.family for row in table.rows}
    rises = {form: _harmless_rise(table, form) for form in SENSED if form in asked}
    return {
        "table": table.to_json(),
        "markdown": table.to_markdown(),
        "sensor": measured.sensed,
        "runners": measured.runners,
        "source": section.source,
        "attack_ratio": {"value": ratio, "budget": section.attack_ratio},
        "harmless_rise": {"value": rises, "budget": section.harmless_rise},
        "passed": ratio <= section.attack_ratio
        and all(rise <= section.harmless_rise for rise in rises.values()),
    }


def _attack_ratio(table: Table) -> float:
    """Guarded over unguarded share of harmful typographic prompts that were not refused."""
    before = table.row("harmful", "typographic", "unguarded").rates["refused"]
    after = table.row("harmful", "typographic", "guarded").rates["refused"]
    missed = before.total - before.count
    return (after.total - after.count) / missed if missed else 1.0


def _harmless_rise(table: Table, form: str) -> float:
    before = table.row("harmless", form, "unguarded").rates["refused"].value
    return table.row("harmless", form, "guarded").rates["refused"].value - before
