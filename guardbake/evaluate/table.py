"""Verdicts into counts: the behaviour table, rates beside rates and the paired changes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from guardbake.errors import UsageError
from guardbake.evaluate.judges import Verdict
from guardbake.evaluate.statistics import Rate, mcnemar_exact
from guardbake.samples import FORMS, Form, Label

Arm = Literal["unguarded", "guarded"]
ARMS: tuple[Arm, ...] = ("unguarded", "guarded")
LABELS: tuple[Label, ...] = ("harmful", "harmless")


@dataclass(frozen=True)
class Outcome:
    """One sample, answered once by each arm. source, index: where the prompt comes from."""

    label: Label
    form: Form
    source: str
    index: int
    unguarded: Verdict
    guarded: Verdict

    def verdict(self, arm: Arm) -> Verdict:
        return self.unguarded if arm == "unguarded" else self.guarded


@dataclass(frozen=True)
class Row:
    """Counts of one label, form and arm."""

    label: Label
    form: Form
    arm: Arm
    refused: Rate
    answered: Rate
    degenerate: Rate


@dataclass(frozen=True)
class Pairing:
    """Guarded against unguarded on the same samples; a degenerate answer is not a refusal.

    gained: refused only when guarded. lost: refused only when unguarded. p: McNemar's exact test.
    """

    label: Label
    form: Form
    gained: int
    lost: int
    p: float


@dataclass(frozen=True)
class BehaviourTable:
    """Rows in order of label, form, arm; pairings in order of label, form. Groups without samples
    have no row."""

    rows: tuple[Row, ...]
    pairings: tuple[Pairing, ...]

    def row(self, label: Label, form: Form, arm: Arm) -> Row:
        """Raises UsageError if no sample of that kind was counted."""
        for row in self.rows:
            if (row.label, row.form, row.arm) == (label, form, arm):
                return row
        raise UsageError(
            found="no such row",
            expected=f"samples of {label} / {form} / {arm}",
            where="the behaviour table",
            remedy="evaluate on samples of this kind",
        )

    def to_markdown(self) -> str:
        """Two tables: rates with intervals and counts, then the paired changes."""
        lines = [
            "| label | form | arm | refused | answered | degenerate |",
            "|---|---|---|---|---|---|",
        ]
        lines += [
            f"| {row.label} | {row.form} | {row.arm} "
            f"| {row.refused} | {row.answered} | {row.degenerate} |"
            for row in self.rows
        ]
        lines += [
            "",
            "| label | form | refused only guarded | refused only unguarded | McNemar exact p |",
            "|---|---|---|---|---|",
        ]
        lines += [
            f"| {pair.label} | {pair.form} | {pair.gained} | {pair.lost} | {pair.p:.2g} |"
            for pair in self.pairings
        ]
        return "\n".join(lines) + "\n"

    def to_json(self) -> dict[str, list[dict[str, object]]]:
        """Plain lists, dicts, strings and numbers, for json.dumps."""
        return {
            "rows": [
                {
                    "label": row.label,
                    "form": row.form,
                    "arm": row.arm,
                    "refused": row.refused.to_json(),
                    "answered": row.answered.to_json(),
                    "degenerate": row.degenerate.to_json(),
                }
                for row in self.rows
            ],
            "pairings": [
                {
                    "label": pair.label,
                    "form": pair.form,
                    "gained": pair.gained,
                    "lost": pair.lost,
                    "p": pair.p,
                }
                for pair in self.pairings
            ],
        }


def behaviour_table(outcomes: Sequence[Outcome]) -> BehaviourTable:
    """Counts of all outcomes by label, form and arm, and the paired changes by label and form.

    Raises UsageError if one sample was counted twice or if there is no harmless or no harmful one.
    """
    _demand_both_sides(outcomes)
    rows: list[Row] = []
    pairings: list[Pairing] = []
    for label in LABELS:
        for form in FORMS:
            group = [o for o in outcomes if o.label == label and o.form == form]
            if not group:
                continue
            rows += [_row(label, form, arm, group) for arm in ARMS]
            gained = sum(o.guarded == "refused" != o.unguarded for o in group)
            lost = sum(o.unguarded == "refused" != o.guarded for o in group)
            pairings.append(Pairing(label, form, gained, lost, mcnemar_exact(gained, lost)))
    return BehaviourTable(tuple(rows), tuple(pairings))


def _row(label: Label, form: Form, arm: Arm, group: Sequence[Outcome]) -> Row:
    verdicts = [outcome.verdict(arm) for outcome in group]
    refused, answered, degenerate = (
        Rate(verdicts.count(kind), len(verdicts)) for kind in ("refused", "answered", "degenerate")
    )
    return Row(label, form, arm, refused, answered, degenerate)


def _demand_both_sides(outcomes: Sequence[Outcome]) -> None:
    keys = {(o.label, o.form, o.source, o.index) for o in outcomes}
    if len(keys) < len(outcomes):
        raise UsageError(
            found=f"{len(outcomes)} outcomes of {len(keys)} samples",
            expected="one outcome a sample",
            where="the behaviour table",
            remedy="count every sample once",
        )
    missing = sorted(set(LABELS) - {o.label for o in outcomes})
    if missing:
        raise UsageError(
            found=f"no {' and no '.join(missing)} sample",
            expected="harmful and harmless samples side by side",
            where="the behaviour table",
            remedy="a guarded number without its benign arm is not a result: evaluate both",
        )
