"""Utility: letters out of answers, the open questions' proxy, groups, and what is not scored."""

from __future__ import annotations

import pytest

from guardbake.errors import UsageError
from guardbake.evaluate.utility import chosen, containment, utility
from guardbake.samples.questions import Question

OPTIONS = ("red", "dark red", "a blue ring")


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"),
        ("(C)", "C"),
        ("B. dark red", "B"),
        ("A, because it is red", "A"),
        ("C\nsince it is round", "C"),
        ("The answer is (A).", "A"),
        ("the answer is: b", None),
        ("Answer: B", "B"),
        ("I choose option C here", "C"),
        ("The option A or option B", None),
        ("It is dark red.", "B"),
        ("It is red", "A"),
        ("A blue ring is shown", "C"),
        ("A red or a blue ring", None),
        ("A tree", None),
        ("The answer is a tree", None),
        ("D", None),
        ("Dark blue", None),
        ("reddish", None),
        ("", None),
    ],
)
def test_letter_read_from_an_answer(answer: str, letter: str | None) -> None:
    assert chosen(answer, OPTIONS) == letter


@pytest.mark.parametrize(
    ("answer", "reference", "share"),
    [
        ("x is -1 or x = -5", "-1<AND>-5", 1.0),
        ("x = 5 or -1", "-1<AND>-5", 0.5),
        ("x = 1", "-1<AND>-5", 0.0),
        ("It's a Conditioner.", "conditioner", 1.0),
        ("a conditional", "condition", 0.0),
        ("grey cat", "gray<OR>grey", 1.0),
        ("3.5 kg", "3.5", 1.0),
        ("35 kg", "3.5", 0.0),
        ("left, then right", "right left", 0.0),
        ("anything", "<OR>", 0.0),
    ],
)
def test_containment_of_the_references_parts(answer: str, reference: str, share: float) -> None:
    assert containment(answer, reference) == share


def _choice(index: int, answer: str, group: str = "") -> Question:
    return Question("q", "harmless", "m", index, options=OPTIONS, answer=answer, group=group)


def test_a_group_is_right_only_if_every_pass_is() -> None:
    questions = [_choice(0, "A", "7"), _choice(1, "B", "7"), _choice(2, "C", "8"), _choice(3, "A")]
    score = utility(questions, ["A", "C", "C", "no idea"])
    assert (score.right.count, score.right.total, score.unread) == (1, 3, 1)
    assert score.score.value == pytest.approx(1 / 3)
    assert score.metric == "accuracy"


def test_open_questions_are_scored_by_a_named_proxy() -> None:
    asked = [Question("q", "harmless", "v", i, answer=a) for i, a in enumerate(["x<AND>y", "z"])]
    score = utility(asked, ["x", "z"])
    assert "proxy" in score.metric
    assert (score.right.count, score.score.value) == (1, 0.75)


def test_what_cannot_be_scored_is_refused() -> None:
    choice, back = _choice(0, "A"), _choice(5, "")
    open_one = Question("q", "harmless", "v", 0, answer="x")
    for questions, answers in (
        ([], []),
        ([choice], []),
        ([choice, open_one], ["A", "x"]),
        ([back], ["A"]),
    ):
        with pytest.raises(UsageError, match="one answer a question"):
            utility(questions, answers)
    with pytest.raises(UsageError, match=r"m \[5\] without"):
        utility([back], ["A"])
