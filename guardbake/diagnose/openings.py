"""The refusal score: log-odds of opening the answer like a refusal against like compliance.

    score = log P(a refusing opening | prompt) - log P(a compliant opening | prompt)

An opening is the first few tokens of one of the recipe's refusing or compliant turns, P the
model's own probability of answering with exactly these tokens, summed over the turns. With one
token this is the refusal metric of Arditi et al. (arXiv 2406.11717); "I" alone also begins "I can
explain". Longer openings read the turn's wording rather than its meaning. Measured on the
undefended demo, 96 fitting prompts as text and as typographic image, area under the curve for
telling refused from other answers (greedy, keyword judge) by the number of tokens:

====== ===== ===== ===== ===== =====
tokens     1     2     3     4     6
====== ===== ===== ===== ===== =====
area   0.953 0.976 0.967 0.964 0.849
====== ===== ===== ===== ===== =====
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from guardbake.errors import RecipeError

Tokens = tuple[int, ...]


@dataclass(frozen=True)
class Openings:
    """refusing, compliant: token ids; no opening begins another one."""

    refusing: tuple[Tokens, ...]
    compliant: tuple[Tokens, ...]

    @property
    def all(self) -> tuple[Tokens, ...]:
        """Refusing, then compliant."""
        return self.refusing + self.compliant

    @cached_property
    def nodes(self) -> tuple[Tokens, ...]:
        """What must be fed after a prompt to score every opening: each prefix once, shorter first.

        The empty prefix, which is the prompt's last token, is not among them.
        """
        prefixes = {opening[:n] for opening in self.all for n in range(1, len(opening))}
        return tuple(sorted(prefixes, key=lambda prefix: (len(prefix), prefix)))


def openings_of(
    tokenizer: Any, refusing: Sequence[str], compliant: Sequence[str], length: int
) -> Openings:
    """The first `length` tokens of each turn, or the whole turn if it is shorter.

    Raises RecipeError if a refusing opening begins a compliant one or the other way round.
    """
    sides = []
    for turns in (refusing, compliant):
        cut = {tuple(tokenizer(t, add_special_tokens=False)["input_ids"][:length]) for t in turns}
        # P(a longer opening) is part of P(one that begins it)
        sides.append(tuple(sorted(o for o in cut if not any(_begins(p, o) for p in cut - {o}))))
    if any(_begins(a, b) or _begins(b, a) for a in sides[0] for b in sides[1]):
        raise RecipeError(
            found=f"refusing and compliant turns that open with the same {length} tokens",
            expected="turns that differ from the start",
            where="fit.refusing and fit.compliant",
            remedy="give other turns, or a larger diagnose.opening",
        )
    return Openings(*sides)


def _begins(short: Tokens, long: Tokens) -> bool:
    return long[: len(short)] == short
