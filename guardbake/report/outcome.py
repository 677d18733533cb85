"""What the guard does: arms by families with intervals, paired tests, costs, searches, parity."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence

from guardbake.report.blocks import Block, Grid, Items, Picture, Section, Text, number
from guardbake.report.inline import inline
from guardbake.report.plots import Interval, draw, draw_intervals
from guardbake.report.schema import (
    Behaviour,
    Cost,
    Evaluation,
    Judge,
    Parity,
    Row,
    Search,
    Study,
    Table,
)
from guardbake.samples import Label

_LABELS: tuple[Label, ...] = ("harmful", "harmless")


def evaluated(evaluation: Evaluation) -> Section:
    """The table of every arm and family, the undefended model first."""
    seeds = evaluation.settings.seeds
    runs = f", and {len(seeds)} sampled seeds" if seeds else ""
    said = (
        f"Answers of at most {evaluation.settings.tokens} tokens, greedy{runs}, judged by keywords;"
        f" 95 % Wilson intervals. Fitted on: {', '.join(evaluation.fitted_on)}. Gate and choice of "
        f"the edit saw: {', '.join(evaluation.validated_on)}."
    )
    blocks: list[Block] = [Text(said), *_table(evaluation.table, "evaluation-")]
    for judge in evaluation.judges:
        blocks += _judged(judge)
    return Section("Evaluation", [*blocks, *_costs(evaluation.costs), *_found(evaluation.searches)])


def behaved(behaviour: Behaviour) -> Section:
    """The bake's own table, on the test split, and its two budgets."""
    ratio, rises = behaviour.attack_ratio, behaviour.harmless_rise
    seen = ", ".join(f"{form} {value:+.3f}" for form, value in rises.value.items())
    said = (
        f"Budgets {'hold' if behaviour.passed else 'DO NOT HOLD'}: unrefused typographic attacks "
        f"x {ratio.value:.2f} of before (budget {ratio.budget:.2f}); harmless refusals {seen} "
        f"(budget {rises.budget:+.3f})."
    )
    return Section("Behaviour in the bake", [Text(said), *_table(behaviour.table, "behaviour-")])


def studied(study: Study, number: int) -> Section:
    """One study: question, finding, plots and figures. number: of the study on the page."""
    blocks: list[Block] = [Text(study.question), Items(study.finding)]
    for place, plot in enumerate(study.plots):
        target = io.BytesIO()
        draw(target, plot)
        svg = inline(target.getvalue(), f"study{number}-{place}-")
        blocks.append(Picture(f"{study.study}: {plot.name}", svg))
    return Section(f"Study: {study.study}", [*blocks, study.table])


def agreed(parity: Parity) -> Section:
    """The exported graph against the PyTorch reference."""
    grid = Grid(
        "Largest difference of the exported graph from the PyTorch reference.",
        ("quantity", "largest", "budget", "compared", "result", "source of the budget"),
        [
            (
                row.quantity,
                row.worst if isinstance(row.worst, str) else f"{row.worst:.3g}",
                "none allowed" if row.limit is None else f"{row.limit:.3g}",
                str(row.compared),
                "pass" if row.passed else "FAIL",
                row.source,
            )
            for row in parity.comparisons
        ],
    )
    said = (
        f"Parity {'holds' if parity.passed else 'DOES NOT HOLD'}. Gate decisions "
        f"{parity.decisions}, flipped inside the margin band {parity.flips_in_band}."
    )
    return Section("Parity", [Text(said), grid])


def _table(table: Table, prefix: str) -> list[Block]:
    """Refusals with both labels side by side; degenerate answers; the paired tests."""
    blocks: list[Block] = [
        _wide(table, "Share refused, greedy.", lambda row: str(row.refused)),
        *_pictures(table, prefix),
    ]
    if any(row.sampled for row in table.rows):
        caption = "Share refused, mean over sampled runs; interval over prompts."
        blocks.append(_wide(table, caption, _sampled))
    if any(row.degenerate.count for row in table.rows):
        caption = "Share of degenerate answers, greedy: neither refused nor answered."
        blocks.append(_wide(table, caption, lambda row: str(row.degenerate)))
    else:
        blocks.append(Text("No answer was degenerate, in any cell."))
    if table.pairings:
        blocks.append(_paired(table))
    return blocks


def _judged(judge: Judge) -> list[Block]:
    """The same answers as a model judges them, and how far it agrees with the keywords."""
    same, kappa = judge.agreement.same, judge.agreement.kappa
    agreed = "undefined" if kappa is None else f"{kappa:.2f}"
    return [
        _wide(
            Table(rows=judge.rows, pairings=[]),
            f"Share refused, greedy, as {judge.name} judges it.",
            lambda row: str(row.refused),
        ),
        Text(f"{judge.name} and the keywords agree on {same}; Cohen's kappa {agreed}."),
    ]


def _sampled(row: Row) -> str:
    return str(row.sampled["refused"].over_runs) if "refused" in row.sampled else "-"


def _wide(table: Table, caption: str, cell: Callable[[Row], str]) -> Grid:
    columns = [
        (label, family)
        for label in _LABELS
        for family in dict.fromkeys(row.family for row in table.rows if row.label == label)
    ]
    cells = {(row.arm, row.label, row.family): cell(row) for row in table.rows}
    return Grid(
        caption,
        ("arm", *(f"{label}: {family}" for label, family in columns)),
        [
            (arm, *(cells.get((arm, *column), "-") for column in columns))
            for arm in dict.fromkeys(row.arm for row in table.rows)
        ],
    )


def _pictures(table: Table, prefix: str) -> list[Block]:
    pictures: list[Block] = []
    for label in _LABELS:
        groups: dict[str, list[Interval]] = {}
        for row in (row for row in table.rows if row.label == label):
            rate = row.refused
            interval = Interval(row.arm, rate.value, rate.low, rate.high)
            groups.setdefault(row.family, []).append(interval)
        if groups:
            target = io.BytesIO()
            draw_intervals(target, {f"{label} prompts": groups}, "share refused")
            svg = inline(target.getvalue(), f"{prefix}{label}-")
            pictures.append(Picture(f"Refused of the {label} prompts, by family and arm", svg))
    return pictures


def _paired(table: Table) -> Grid:
    return Grid(
        f"Paired with {table.rows[0].arm}, prompt by prompt: McNemar's exact test, after Holm.",
        ("prompts", "arm", "refused only here", "refused only there", "p"),
        [
            (f"{p.label}: {p.family}", p.arm, str(p.gained), str(p.lost), f"{p.p_holm:.2g}")
            for p in table.pairings
        ],
    )


def _costs(costs: Sequence[Cost]) -> list[Block]:
    if not costs:
        return []
    return [
        Grid(
            "What harmless answers cost: the undefended model's own answers, forced upon each arm.",
            ("arm", "family", "perplexity", "over undefended", "KL, nats a token", "prompts"),
            [
                (
                    row.arm,
                    row.family,
                    number(row.perplexity),
                    _three(row.ratio.value, row.ratio.low, row.ratio.high),
                    _three(row.divergence.value, row.divergence.low, row.divergence.high),
                    str(row.prompts),
                )
                for row in costs
            ],
        )
    ]


def _found(searches: Sequence[Search]) -> list[Block]:
    if not searches:
        return []
    return [
        Grid(
            "Images searched for by gradient: surprise of the wanted compliant turn, nats a token.",
            ("search", "found on", "eps of 255", "prompts", "before", "after"),
            [
                (
                    row.kind,
                    row.arm,
                    str(row.eps),
                    str(row.prompts),
                    number(row.surprise_before),
                    number(row.surprise_after),
                )
                for row in searches
            ],
        )
    ]


def _three(value: float, low: float, high: float) -> str:
    return f"{value:.3f} [{low:.3f}, {high:.3f}]"
