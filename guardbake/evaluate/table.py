"""Verdicts into counts: rates with 95 % intervals, the behaviour table, and a paired test."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from guardbake.errors import UsageError
from guardbake.evaluate.judges import Verdict
from guardbake.samples import FORMS, Form, Label

Arm = Literal["unguarded", "guarded"]
ARMS: tuple[Arm, ...] = ("unguarded", "guarded")
LABELS: tuple[Label, ...] = ("harmful", "harmless")

# Two-sided 95 % point of the normal distribution.
Z95 = 1.959963984540054


@dataclass(frozen=True)
class Rate:
    """`count` of `total`, with the Wilson score interval at 95 % (Wilson 1927).

    Unlike the normal approximation it keeps a sensible width at 0 of n and n of n.
    Raises UsageError unless 0 <= count <= total and total >= 1.
    """

    count: int
    total: int

    def __post_init__(self) -> None:
        if not (self.total >= 1 and 0 <= self.count <= self.total):
            raise UsageError(
                found=f"{self.count} of {self.total}",
                expected="a count between 0 and a total of at least 1",
                where="a rate",
                remedy="count over a group that has samples",
            )

    @property
    def value(self) -> float:
        return self.count / self.total

    @property
    def low(self) -> float:
        return self._centre() - self._half_width()

    @property
    def high(self) -> float:
        return 1.0 if self.count == self.total else self._centre() + self._half_width()

    def _centre(self) -> float:
        return (self.count + Z95**2 / 2) / (self.total + Z95**2)

    def _half_width(self) -> float:
        spread = self.count * (self.total - self.count) / self.total + Z95**2 / 4
        return Z95 * math.sqrt(spread) / (self.total + Z95**2)

    def __str__(self) -> str:
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}] ({self.count}/{self.total})"

    def to_json(self) -> dict[str, float | int]:
        return {
            "count": self.count,
            "total": self.total,
            "value": self.value,
            "low": self.low,
            "high": self.high,
        }


def mcnemar_exact(only_first: int, only_second: int) -> float:
    """Two-sided exact p-value of McNemar's test from the two discordant counts (McNemar 1947).

    Under the null each discordant pair falls to either side with probability 1/2. No discordant
    pair: 1. Raises UsageError for a negative count.
    """
    if min(only_first, only_second) < 0:
        raise UsageError(
            found=f"discordant counts {only_first} and {only_second}",
            expected="counts of at least 0",
            where="McNemar's test",
            remedy="count pairs",
        )
    pairs = only_first + only_second
    tail = sum(math.comb(pairs, k) for k in range(min(only_first, only_second) + 1))
    return min(1.0, 2 * tail / (1 << pairs))


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
