"""Table: rows, pairing, and what it refuses to count."""

from __future__ import annotations

import json

import pytest

from guardbake.errors import UsageError
from guardbake.evaluate.judges import Verdict
from guardbake.evaluate.statistics import Rate, mcnemar_exact
from guardbake.evaluate.table import Outcome, behaviour_table
from guardbake.samples import Form, Label


def _outcomes(label: Label, form: Form, *pairs: tuple[Verdict, Verdict]) -> list[Outcome]:
    return [Outcome(label, form, "ours", i, *pair) for i, pair in enumerate(pairs)]


SAMPLES = _outcomes(
    "harmful",
    "text",
    ("answered", "refused"),
    ("answered", "refused"),
    ("degenerate", "refused"),
    ("refused", "degenerate"),
    ("refused", "refused"),
    ("answered", "answered"),
) + _outcomes("harmless", "blank", ("answered", "answered"), ("answered", "degenerate"))


def test_rows_count_each_arm() -> None:
    table = behaviour_table(SAMPLES)
    unguarded = table.row("harmful", "text", "unguarded")
    guarded = table.row("harmful", "text", "guarded")
    assert (unguarded.refused.count, unguarded.answered.count, unguarded.degenerate.count) == (
        2,
        3,
        1,
    )
    assert (guarded.refused.count, guarded.answered.count, guarded.degenerate.count) == (4, 1, 1)
    assert guarded.refused.total == 6
    assert [(row.label, row.form, row.arm) for row in table.rows] == [
        ("harmful", "text", "unguarded"),
        ("harmful", "text", "guarded"),
        ("harmless", "blank", "unguarded"),
        ("harmless", "blank", "guarded"),
    ]


def test_pairs_count_changes_of_refusal_only() -> None:
    harmful, harmless = behaviour_table(SAMPLES).pairings
    assert (harmful.gained, harmful.lost, harmful.p) == (3, 1, mcnemar_exact(3, 1))
    assert (harmless.gained, harmless.lost, harmless.p) == (0, 0, 1.0)


def test_renderings_hold_the_same_counts() -> None:
    table = behaviour_table(SAMPLES)
    markdown = table.to_markdown()
    assert "| harmful | text | guarded | 0.67 [0.30, 0.90] (4/6) |" in markdown
    assert "| harmful | text | 3 | 1 | 0.62 |" in markdown
    document = json.loads(json.dumps(table.to_json()))
    assert document["rows"][1]["refused"]["count"] == 4
    assert document["rows"][1]["refused"]["low"] == Rate(4, 6).low
    assert document["pairings"][0] == {
        "label": "harmful",
        "form": "text",
        "gained": 3,
        "lost": 1,
        "p": 0.625,
    }


def test_table_demands_the_benign_arm() -> None:
    with pytest.raises(UsageError, match="no harmless sample"):
        behaviour_table(SAMPLES[:6])
    with pytest.raises(UsageError, match="no harmful sample"):
        behaviour_table(SAMPLES[6:])
    with pytest.raises(UsageError, match="no harmful and no harmless"):
        behaviour_table([])


def test_table_refuses_a_sample_counted_twice() -> None:
    with pytest.raises(UsageError, match="9 outcomes of 8 samples"):
        behaviour_table([*SAMPLES, SAMPLES[0]])


def test_absent_row_is_an_error() -> None:
    with pytest.raises(UsageError, match="no such row"):
        behaviour_table(SAMPLES).row("harmful", "typographic", "guarded")
