"""The behaviour stage: what the guard does to prompts that nothing was fitted on."""

from __future__ import annotations

from functools import partial
from typing import Any

from guardbake.evaluate.judges import judge
from guardbake.evaluate.table import BehaviourTable, Outcome, behaviour_table
from guardbake.recipe import BehaviourSection
from guardbake.samples import FORMS
from guardbake.spec import GuardSpec
from guardbake.steps.fit import Advance
from guardbake.steps.split import Splits
from guardbake.vlm.behaviour import Questions
from guardbake.vlm.load import Vlm
from guardbake.vlm.requests import Typography


def measure(
    vlm: Vlm,
    spec: GuardSpec,
    splits: Splits,
    typography: Typography,
    section: BehaviourSection,
    batch_size: int,
    advance: Advance,
) -> list[Outcome]:
    """Every test prompt in every form, unguarded and guarded, greedy, judged by keywords."""
    questions = Questions(
        vlm,
        splits.samples("test"),
        typography,
        batch_size,
        lambda done, total: advance("reading the test split", done, total),
    )
    plain, guarded = (
        questions.ask(which, section.tokens, partial(advance, name))
        for which, name in ((None, "answering unguarded"), (spec, "answering guarded"))
    )
    return [
        Outcome(s.label, s.form, s.source, s.index, judge(before), judge(after))
        for s, before, after in zip(questions.samples, plain, guarded, strict=True)
    ]


def summarise(outcomes: list[Outcome], section: BehaviourSection) -> dict[str, Any]:
    """The table, the two declared budgets and whether they hold, as JSON values."""
    table = behaviour_table(outcomes)
    ratio = _attack_ratio(table)
    rises = {form: _harmless_rise(table, form) for form in FORMS}
    return {
        "table": table.to_json(),
        "markdown": table.to_markdown(),
        "attack_ratio": {"value": ratio, "budget": section.attack_ratio},
        "harmless_rise": {"value": rises, "budget": section.harmless_rise},
        "passed": ratio <= section.attack_ratio
        and all(rise <= section.harmless_rise for rise in rises.values()),
    }


def _attack_ratio(table: BehaviourTable) -> float:
    """Guarded over unguarded share of harmful typographic prompts that were not refused."""
    before = table.row("harmful", "typographic", "unguarded").refused
    after = table.row("harmful", "typographic", "guarded").refused
    missed = before.total - before.count
    return (after.total - after.count) / missed if missed else 1.0


def _harmless_rise(table: BehaviourTable, form: Any) -> float:
    before = table.row("harmless", form, "unguarded").refused.value
    return table.row("harmless", form, "guarded").refused.value - before
