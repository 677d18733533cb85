"""Two judges side by side: counts and kappa against a worked example."""

from __future__ import annotations

import json
from collections.abc import Sequence

import pytest

from guardbake.errors import UsageError
from guardbake.evaluate.agreement import agreement
from guardbake.evaluate.judges import Judge, KeywordJudge, Verdict
from guardbake.samples import Label, Sample


class LengthJudge:
    """A judge that thinks every long answer is one."""

    name = "length"
    labels: frozenset[Label] = frozenset({"harmful"})

    def judge(self, requests: Sequence[Sample], answers: Sequence[str]) -> list[Verdict]:
        return ["answered" if len(answer) > 30 else "refused" for answer in answers]


def _verdicts(refused: int, answered: int) -> list[Verdict]:
    return ["refused"] * refused + ["answered"] * answered


def test_kappa_of_a_textbook_table() -> None:
    # Two readers, 50 cases: yes/yes 20, yes/no 5, no/yes 10, no/no 15. Expected agreement 0.5.
    one = _verdicts(25, 25)
    two = _verdicts(20, 5) + _verdicts(10, 15)
    found = agreement("a", one, "b", two)
    assert found.kappa == pytest.approx(0.4)
    assert (found.same.count, found.same.total) == (35, 50)
    assert found.counts["refused", "answered"] == 5
    assert found.counts["answered", "refused"] == 10


def test_kappa_at_its_ends() -> None:
    mixed = _verdicts(3, 3)
    assert agreement("a", mixed, "b", mixed).kappa == 1.0
    assert agreement("a", mixed, "b", mixed[::-1]).kappa == -1.0
    alike = agreement("a", mixed[:3], "b", mixed[:3])
    assert (alike.kappa, alike.same.value) == (None, 1.0)
    assert "undefined" in alike.to_markdown()


def test_two_judges_of_the_same_answers() -> None:
    answers = [
        "I'm sorry, but I can't help with that.",
        "Sure, here is a tree: an oak.",
        "I'm sorry, no.",
        "ha ha ha ha ha ha ha",
    ]
    asked = [Sample("a tree", "harmful", "text", "mini", i) for i in range(len(answers))]
    judges: list[Judge] = [KeywordJudge(), LengthJudge()]
    one, two = (judge.judge(asked, answers) for judge in judges)
    assert one == ["refused", "answered", "answered", "degenerate"]
    found = agreement(judges[0].name, one, judges[1].name, two)
    assert found.same.count == 0
    assert found.counts["degenerate", "refused"] == 1
    assert json.loads(json.dumps(found.to_json()))["counts"][0] == [0, 1, 0]
    assert "| refused | 0 | 1 | 0 |" in found.to_markdown()


def test_verdicts_on_other_answers_are_refused() -> None:
    with pytest.raises(UsageError, match="2 and 1 verdicts"):
        agreement("a", _verdicts(1, 1), "b", _verdicts(1, 0))
    with pytest.raises(UsageError, match="0 and 0"):
        agreement("a", [], "b", [])
