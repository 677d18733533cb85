"""Questions of utility benchmarks: what a guard must not cost.

A question is a harmless prompt with a picture, so it can stand wherever harmless prompts do; and it
carries what its answer is scored by (`guardbake.evaluate.utility`).
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from guardbake.errors import MalformedError
from guardbake.samples import Prompt

LETTERS = string.ascii_uppercase
Scoring = Literal["choice", "containment"]


@dataclass(frozen=True)
class Question(Prompt):
    """One question about one picture.

    options: the texts of the choices, lettered A, B, ... in this order; empty for an open question.
    answer: the right letter, or the reference text of an open question; "" where the benchmark
      keeps it back.
    group: what the question repeats; a group counts as right only if every repetition of it is
      (MMBench's circular evaluation). "" if it stands alone.
    """

    options: tuple[str, ...] = field(default=(), repr=False)
    answer: str = field(default="", repr=False)
    group: str = ""

    @property
    def scoring(self) -> Scoring:
        return "choice" if self.options else "containment"


def asked_with_options(question: str, hint: str, options: Sequence[str], place: str) -> str:
    """The words of a multiple choice question: hint, question, one line an option, what to do.

    Raises MalformedError for less than two options and for more than there are letters.
    """
    if not 2 <= len(options) <= len(LETTERS):
        raise MalformedError(
            found=f"{len(options)} options",
            expected=f"2 to {len(LETTERS)}",
            where=place,
            remedy="mend the benchmark's file",
        )
    lines = [hint.strip(), question.strip()]
    lines += [f"{letter}. {text}" for letter, text in zip(LETTERS, options, strict=False)]
    lines.append("Reply with the letter of the right option.")
    return "\n".join(line for line in lines if line)
