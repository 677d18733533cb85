"""Verdicts into counts: one table of arms by families, and every arm against the first."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np

from guardbake.errors import UsageError
from guardbake.evaluate.judges import Verdict
from guardbake.evaluate.statistics import Interval, Pooled, Rate, holm, mcnemar_exact, pooled
from guardbake.samples import Label

LABELS: tuple[Label, ...] = ("harmful", "harmless")
VERDICTS: tuple[Verdict, ...] = ("refused", "answered", "degenerate")
GREEDY = "greedy"
SEED = 0  # of the bootstrap over prompts

Verdicts = Mapping[str, Sequence[Verdict]]
"""One verdict a prompt, by the name of the run: "greedy", and "seed 0" and so on if sampled."""


@dataclass(frozen=True, eq=False)
class Group:
    """The prompts of one label and family, and what every arm did with them.

    prompts: (source, index) of each. verdicts[arm]: in the order of the prompts; the first arm is
    the one that the others are compared with.
    """

    label: Label
    family: str
    prompts: Sequence[tuple[str, int]]
    verdicts: Mapping[str, Verdicts]


@dataclass(frozen=True)
class Row:
    """Greedy counts of one label, family and arm, and over the sampled runs if there are any."""

    label: Label
    family: str
    arm: str
    rates: Mapping[Verdict, Rate]
    sampled: Mapping[Verdict, Pooled]

    def to_json(self) -> dict[str, Any]:
        return {
            "label": self.label,
            "family": self.family,
            "arm": self.arm,
            **{str(verdict): rate.to_json() for verdict, rate in self.rates.items()},
            "sampled": {verdict: one.to_json() for verdict, one in self.sampled.items()},
        }


@dataclass(frozen=True)
class Pairing:
    """An arm against the first one on the same prompts, greedy; degenerate is not refused.

    gained: refused only under this arm. lost: refused only under the first. p: McNemar's exact
    test; p_holm: the same, adjusted for all pairings of the table.
    """

    label: Label
    family: str
    arm: str
    gained: int
    lost: int
    p: float
    p_holm: float


@dataclass(frozen=True)
class Table:
    """Rows and pairings in order of label, family and arm, families and arms as they came."""

    rows: tuple[Row, ...]
    pairings: tuple[Pairing, ...]

    def row(self, label: Label, family: str, arm: str) -> Row:
        """Raises UsageError if no sample of that kind was counted."""
        for row in self.rows:
            if (row.label, row.family, row.arm) == (label, family, arm):
                return row
        raise UsageError(
            found="no such row",
            expected=f"samples of {label} / {family} / {arm}",
            where="the behaviour table",
            remedy="evaluate on samples of this kind",
        )

    def to_json(self) -> dict[str, list[dict[str, Any]]]:
        """Plain lists, dicts, strings and numbers, for json.dumps."""
        return {
            "rows": [row.to_json() for row in self.rows],
            "pairings": [asdict(pairing) for pairing in self.pairings],
        }

    def to_markdown(self) -> str:
        """Arms by families for each label and verdict, then the paired changes."""
        return "\n".join([*wide(self.rows), self._changes()])

    def _changes(self) -> str:
        first = self.rows[0].arm
        lines = [
            f"**Paired with {first}, prompt by prompt**",
            "",
            f"| label | family | arm | refused only here | refused only {first} "
            "| McNemar exact p | after Holm |",
            "|---|---|---|---|---|---|---|",
        ]
        lines += [
            f"| {p.label} | {p.family} | {p.arm} | {p.gained} | {p.lost} "
            f"| {p.p:.2g} | {p.p_holm:.2g} |"
            for p in self.pairings
        ]
        return "\n".join(lines) + "\n"


def rows_of(groups: Sequence[Group]) -> list[Row]:
    """Every group counted, in order of label; UsageError for groups that do not match."""
    for group in groups:
        _check(group, groups[0])
    return [
        _row(group, arm)
        for label in LABELS
        for group in groups
        if group.label == label
        for arm in group.verdicts
    ]


def wide(rows: Sequence[Row]) -> list[str]:
    """Markdown tables of arms by families, one for each label and verdict, each with its title."""
    parts = []
    for label in dict.fromkeys(row.label for row in rows):
        own = [row for row in rows if row.label == label]
        for verdict in VERDICTS:
            parts.append(_wide(own, f"{label} prompts: {verdict}", partial(_greedy, verdict)))
        if any(row.sampled for row in own):
            for verdict in VERDICTS:
                title = f"{label} prompts: {verdict}, mean over sampled runs"
                parts.append(_wide(own, title, partial(_over_runs, verdict)))
    return parts


def _wide(rows: Sequence[Row], title: str, cell: Callable[[Row], Rate | Interval]) -> str:
    if not any(cell(row).value for row in rows):
        return f"**{title}**: none in any cell.\n"
    families = list(dict.fromkeys(row.family for row in rows))
    lines = [f"**{title}**", "", f"| arm | {' | '.join(families)} |"]
    lines.append("|---" * (len(families) + 1) + "|")
    for arm in dict.fromkeys(row.arm for row in rows):
        cells = {row.family: str(cell(row)) for row in rows if row.arm == arm}
        lines.append(f"| {arm} | {' | '.join(cells.get(family, '-') for family in families)} |")
    return "\n".join(lines) + "\n"


def table_of(groups: Sequence[Group]) -> Table:
    """Count all groups.

    Raises UsageError for a prompt counted twice, for groups that do not hold the first arm and
    the same runs, and unless there are harmful and harmless prompts.
    """
    _demand_both_sides(groups)
    rows, changes = rows_of(groups), []
    for label in LABELS:
        for group in (g for g in groups if g.label == label):
            first, *others = group.verdicts
            changes += [_changed(group, first, arm) for arm in others]
    adjusted = holm([change[-1] for change in changes])
    pairings = [Pairing(*change, p) for change, p in zip(changes, adjusted, strict=True)]
    return Table(tuple(rows), tuple(pairings))


def _row(group: Group, arm: str) -> Row:
    runs = group.verdicts[arm]
    greedy = runs[GREEDY]
    rates = {verdict: Rate(list(greedy).count(verdict), len(greedy)) for verdict in VERDICTS}
    seeds = {run: np.array(verdicts) for run, verdicts in runs.items() if run != GREEDY}
    sampled = {
        verdict: pooled({run: seen == verdict for run, seen in seeds.items()}, SEED)
        for verdict in VERDICTS
        if seeds
    }
    return Row(group.label, group.family, arm, rates, sampled)


def _changed(group: Group, first: str, arm: str) -> tuple[Label, str, str, int, int, float]:
    before, after = (np.array(group.verdicts[a][GREEDY]) == "refused" for a in (first, arm))
    gained, lost = int((after & ~before).sum()), int((before & ~after).sum())
    return group.label, group.family, arm, gained, lost, mcnemar_exact(gained, lost)


def _greedy(verdict: Verdict, row: Row) -> Rate:
    return row.rates[verdict]


def _over_runs(verdict: Verdict, row: Row) -> Interval:
    return row.sampled[verdict].over_runs


def _check(group: Group, other: Group) -> None:
    where = f"{group.label} / {group.family}"
    if len(set(group.prompts)) < len(group.prompts):
        found = f"{len(group.prompts)} prompts, {len(set(group.prompts))} of them different"
        raise _refuse(found, "every prompt once", where)
    shape = {arm: list(runs) for arm, runs in group.verdicts.items()}
    # the first arm, which the others are paired with, is asked everything; they need not be
    first = next(iter(other.verdicts), None)
    expected = {a: list(runs) for a, runs in other.verdicts.items() if a in shape or a == first}
    if shape != expected or not all(GREEDY in runs for runs in shape.values()):
        raise _refuse(f"arms and runs {shape}", f"{expected}, a greedy run among them", where)
    lengths = {len(v) for runs in group.verdicts.values() for v in runs.values()}
    if lengths != {len(group.prompts)}:
        raise _refuse(f"{sorted(lengths)} verdicts", f"{len(group.prompts)}, one a prompt", where)


def _demand_both_sides(groups: Sequence[Group]) -> None:
    missing = sorted(set(LABELS) - {group.label for group in groups if group.prompts})
    if missing:
        raise UsageError(
            found=f"no {' and no '.join(missing)} sample",
            expected="harmful and harmless samples side by side",
            where="the behaviour table",
            remedy="a guarded number without its benign arm is not a result: evaluate both",
        )


def _refuse(found: str, expected: str, where: str) -> UsageError:
    return UsageError(
        found=found,
        expected=expected,
        where=f"the behaviour table, {where}",
        remedy="count every arm on the same prompts",
    )
