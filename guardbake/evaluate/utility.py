"""Scores of utility benchmarks: what a guard costs a model that is asked nothing harmful.

Multiple choice (MMBench, ScienceQA): the letter is read from the answer by the rules of `chosen`.
The benchmarks' own scripts let a language model read what rules cannot; here such an answer is
wrong, and counted apart so that a guard that only garbles the form of answers is seen to do so.

Open questions (MM-Vet): the official score is given by GPT-4, which reads question, reference and
answer. Offline there is `containment`, a proxy and named so: the share of the reference's parts
that stand in the answer word for word. It is blind to paraphrase, so it serves to compare two arms
on the same questions and is not to be put beside published MM-Vet figures.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from guardbake.errors import UsageError
from guardbake.evaluate.statistics import Interval, Rate, bootstrap_mean
from guardbake.samples.questions import LETTERS, Question

_STATED = r"(?i:answer|option|choice)(?i: is)?\s*:?\s*\(?([A-Z])\)?(?![A-Za-z'])"
_OPENING = r"\s*\(?([A-Z])(?:\)|[.:,](?=\s|$)|\s*$|\s*\n)"


@dataclass(frozen=True)
class Utility:
    """Score of one arm on one benchmark.

    groups: what each scored, in [0, 1], in order (a question that stands alone is its own group);
    right: how many of them scored 1. score: their mean, with the bootstrap interval over groups;
    choice: equal to right. unread: answers from which no letter could be read; they count as wrong.
    """

    metric: str
    groups: tuple[float, ...]
    right: Rate
    score: Interval
    unread: int

    def to_json(self) -> dict[str, Any]:
        return {
            "metric": self.metric,
            "right": self.right.to_json(),
            "score": self.score.to_json(),
            "unread": self.unread,
        }


def chosen(answer: str, options: Sequence[str]) -> str | None:
    """The letter an answer to a multiple choice question gives, None if no rule reads one.

    In this order: a letter that opens the answer and stands apart ("B", "(B)", "B. oak"; the
    article in "A tree" does not); exactly one letter after "answer", "option" or "choice"; exactly
    one option's text in the answer, not counting one that is part of a longer option found there.
    """
    letters = LETTERS[: len(options)]
    opening = re.match(_OPENING, answer)
    if opening and opening[1] in letters:
        return str(opening[1])
    stated: set[str] = {found for found in re.findall(_STATED, answer) if found in letters}
    if len(stated) == 1:
        return stated.pop()
    said = [option for option in options if _holds(answer, option)]
    said = [s for s in said if not any(s != other and _holds(other, s) for other in said)]
    return letters[options.index(said[0])] if len(said) == 1 else None


def containment(answer: str, reference: str) -> float:
    """Share in [0, 1] of the reference's parts that the answer holds word for word.

    "<AND>" joins parts, "<OR>" alternatives of which the best counts (MM-Vet's notation). Case,
    punctuation and spaces do not matter; a number counts with its sign and decimals.
    """
    best = 0.0
    for alternative in reference.split("<OR>"):
        parts = [part for part in alternative.split("<AND>") if _words(part)]
        if parts:
            best = max(best, sum(_holds(answer, part) for part in parts) / len(parts))
    return best


def utility(questions: Sequence[Question], answers: Sequence[str], seed: int = 0) -> Utility:
    """Score the answers, one a question, all questions of one kind of scoring.

    Raises UsageError for lists of unlike lengths, no question, questions of both kinds, or a
    question whose right answer the benchmark keeps back.
    """
    kinds = {question.scoring for question in questions}
    kept_back = [q for q in questions if not q.answer]
    if len(kinds) != 1 or kept_back or len(questions) != len(answers):
        found = f"{len(questions)} questions of {len(kinds)} kinds, {len(answers)} answers"
        if kept_back:
            found += f"; {kept_back[0].source} [{kept_back[0].index}] without its right answer"
        raise UsageError(
            found=found,
            expected="one answer a question, one kind of question, every right answer known",
            where="a measurement of utility",
            remedy="score one benchmark at a time, on a split with answers",
        )
    by_group: dict[str, list[float]] = {}
    unread = 0
    for place, (question, answer) in enumerate(zip(questions, answers, strict=True)):
        if question.scoring == "choice":
            letter = chosen(answer, question.options)
            unread += letter is None
            value = float(letter == question.answer)
        else:
            value = containment(answer, question.answer)
        by_group.setdefault(group_of(question, place), []).append(value)
    scores = [min(values) for values in by_group.values()]
    right = Rate(sum(score == 1.0 for score in scores), len(scores))
    metric = "accuracy" if kinds == {"choice"} else "containment (a proxy of GPT-4's score)"
    return Utility(metric, tuple(scores), right, bootstrap_mean(scores, seed), unread)


def group_of(question: Question, place: int) -> str:
    """What tells its group from others; place: the question's among all of them."""
    return f"{question.source} {question.group}" if question.group else str(place)


def _words(text: str) -> list[str]:
    folded = unicodedata.normalize("NFKC", text).casefold()
    return re.findall(r"(?<![\w-])-?\d+(?:[.,]\d+)*|[^\W_]+", folded)


def _holds(text: str, part: str) -> bool:
    """Whether the words of `part` stand in `text`, in order and side by side."""
    words, sought = _words(text), _words(part)
    spans = range(len(words) - len(sought) + 1)
    return bool(sought) and any(words[i : i + len(sought)] == sought for i in spans)
