"""Table: counts of every arm, the pairing, and what it refuses to count."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from guardbake.errors import UsageError
from guardbake.evaluate.judges import Verdict
from guardbake.evaluate.statistics import Rate, holm, mcnemar_exact, pooled
from guardbake.evaluate.table import Group, table_of

A: Verdict = "answered"
R: Verdict = "refused"
D: Verdict = "degenerate"
HARMFUL = Group(
    "harmful",
    "text",
    [("ours", n) for n in range(6)],
    {
        "undefended": {"greedy": [A, A, D, R, R, A]},
        "guard": {"greedy": [R, R, R, D, R, A]},
        "gate-only": {"greedy": [R, R, R, R, R, R]},
    },
)
HARMLESS = Group(
    "harmless",
    "blank",
    [("ours", 0), ("theirs", 0)],
    {
        "undefended": {"greedy": [A, A]},
        "guard": {"greedy": [A, D]},
        "gate-only": {"greedy": [A, R]},
    },
)
GROUPS = [HARMFUL, HARMLESS]


def test_rows_count_each_arm() -> None:
    table = table_of(GROUPS)
    counts = {
        arm: [table.row("harmful", "text", arm).rates[v].count for v in (R, A, D)]
        for arm in HARMFUL.verdicts
    }
    assert counts == {"undefended": [2, 3, 1], "guard": [4, 1, 1], "gate-only": [6, 0, 0]}
    assert table.row("harmful", "text", "guard").rates[R].total == 6
    assert [(row.label, row.family, row.arm) for row in table.rows] == [
        *(("harmful", "text", arm) for arm in HARMFUL.verdicts),
        *(("harmless", "blank", arm) for arm in HARMFUL.verdicts),
    ]
    assert all(not row.sampled for row in table.rows)


def test_harmful_prompts_come_first_whatever_the_order() -> None:
    assert table_of(GROUPS[::-1]).rows == table_of(GROUPS).rows


def test_pairs_count_changes_of_refusal_only_against_the_first_arm() -> None:
    changes = [(p.arm, p.gained, p.lost, p.p) for p in table_of(GROUPS).pairings]
    assert changes == [
        ("guard", 3, 1, mcnemar_exact(3, 1)),
        ("gate-only", 4, 0, mcnemar_exact(4, 0)),
        ("guard", 0, 0, 1.0),
        ("gate-only", 1, 0, 1.0),
    ]
    adjusted = [p.p_holm for p in table_of(GROUPS).pairings]
    assert adjusted == holm([p for *_, p in changes])
    assert adjusted[1] == 4 * mcnemar_exact(4, 0)


def test_sampled_runs_are_pooled_by_prompt_and_leave_the_greedy_counts_alone() -> None:
    seeds = {"seed 0": [R, A, A, R, R, D], "seed 1": [A, A, A, R, R, D]}
    groups = [
        replace(
            group,
            verdicts={
                arm: runs | {name: list(all_)[: len(group.prompts)] for name, all_ in seeds.items()}
                for arm, runs in group.verdicts.items()
            },
        )
        for group in GROUPS
    ]
    table = table_of(groups)
    row = table.row("harmful", "text", "guard")
    assert row.rates == table_of(GROUPS).row("harmful", "text", "guard").rates
    expected = pooled({run: np.array(seen) == R for run, seen in seeds.items()}, 0)
    assert row.sampled[R] == expected
    assert expected.over_runs.value == pytest.approx(5 / 12)
    assert str(expected.over_runs) in table.to_markdown()
    assert table.to_json()["rows"][1]["sampled"]["refused"]["runs"]["seed 0"]["count"] == 3


def test_renderings_hold_the_same_counts() -> None:
    table = table_of([*GROUPS, replace(HARMFUL, family="pgd 16")])
    markdown = table.to_markdown()
    assert "| arm | text | pgd 16 |" in markdown
    line = "| guard | 0.67 [0.30, 0.90] (4/6) | 0.67 [0.30, 0.90] (4/6) |"
    assert line in markdown.split("**harmful prompts: answered**")[0]
    assert "| harmful | text | guard | 3 | 1 | 0.62 | 1 |" in markdown
    document = json.loads(json.dumps(table.to_json()))
    assert document["rows"][1]["refused"]["count"] == 4
    assert document["rows"][1]["refused"]["low"] == Rate(4, 6).low
    assert document["pairings"][0] == {
        "label": "harmful",
        "family": "text",
        "arm": "guard",
        "gained": 3,
        "lost": 1,
        "p": 0.625,
        "p_holm": 1.0,
    }


def test_table_demands_the_benign_arm() -> None:
    with pytest.raises(UsageError, match="no harmless sample"):
        table_of([HARMFUL])
    with pytest.raises(UsageError, match="no harmful sample"):
        table_of([HARMLESS])
    with pytest.raises(UsageError, match="no harmful and no harmless"):
        table_of([])


def test_an_arm_that_was_not_asked_leaves_a_gap() -> None:
    alone = replace(HARMLESS, verdicts={"undefended": {"greedy": [A, A]}})
    table = table_of([HARMFUL, replace(HARMLESS, family="other"), alone])
    lines = table.to_markdown().split("**harmless prompts: answered**")[1].splitlines()
    cells = {line.split(" | ")[0]: line.split(" | ")[1:] for line in lines if " | " in line}
    assert cells["| arm"] == ["other", f"{HARMLESS.family} |"]
    assert cells["| guard"][1] == "- |"
    assert "-" not in cells["| undefended"][1][:2]
    assert {p.family for p in table.pairings if p.label == "harmless"} == {"other"}


@pytest.mark.parametrize(
    ("group", "found"),
    [
        (replace(HARMLESS, prompts=[("ours", 0)] * 2), "2 prompts, 1 of them different"),
        (replace(HARMLESS, prompts=[("ours", n) for n in range(3)]), r"\[2\] verdicts"),
        (replace(HARMLESS, verdicts={"guard": {"greedy": [A, A]}}), "arms and runs"),
        (
            replace(HARMLESS, verdicts={arm: {"seed 0": [A, A]} for arm in HARMFUL.verdicts}),
            "arms and runs",
        ),
    ],
)
def test_groups_that_do_not_match_are_refused(group: Group, found: str) -> None:
    with pytest.raises(UsageError, match=found):
        table_of([HARMFUL, group])


def test_absent_row_is_an_error() -> None:
    with pytest.raises(UsageError, match="no such row"):
        table_of(GROUPS).row("harmful", "typographic", "guard")
