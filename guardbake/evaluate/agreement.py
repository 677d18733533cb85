"""Two judges side by side: how often they agree, and how much of that is more than chance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import get_args

from guardbake.errors import UsageError
from guardbake.evaluate.judges import Verdict
from guardbake.evaluate.statistics import Rate

VERDICTS: tuple[Verdict, ...] = get_args(Verdict)


@dataclass(frozen=True)
class Agreement:
    """Verdicts of two judges on the same answers.

    counts[a, b]: how often the first said a and the second b. same: how often a == b.
    kappa: Cohen's (Cohen 1960), 1 for full agreement, 0 for what chance would give; None where both
      said the same one thing throughout, so that chance explains all.
    """

    first: str
    second: str
    counts: Mapping[tuple[Verdict, Verdict], int]
    same: Rate
    kappa: float | None

    def to_markdown(self) -> str:
        """A table with the first judge's verdicts in rows, and a line below it."""
        lines = [f"| {self.first} \\\\ {self.second} | {' | '.join(VERDICTS)} |", "|---" * 4 + "|"]
        for a in VERDICTS:
            row = " | ".join(str(self.counts[a, b]) for b in VERDICTS)
            lines.append(f"| {a} | {row} |")
        kappa = "undefined" if self.kappa is None else f"{self.kappa:.2f}"
        return "\n".join([*lines, "", f"agreement {self.same}, Cohen's kappa {kappa}"]) + "\n"

    def to_json(self) -> dict[str, object]:
        return {
            "judges": [self.first, self.second],
            "counts": [[self.counts[a, b] for b in VERDICTS] for a in VERDICTS],
            "verdicts": list(VERDICTS),
            "same": self.same.to_json(),
            "kappa": self.kappa,
        }


def agreement(first: str, one: Sequence[Verdict], second: str, two: Sequence[Verdict]) -> Agreement:
    """Compare the verdicts `one` and `two` of the judges named first and second.

    Raises UsageError for lists of unlike lengths or none.
    """
    if len(one) != len(two) or not one:
        raise UsageError(
            found=f"{len(one)} and {len(two)} verdicts",
            expected="two verdicts on each answer",
            where=f"judges {first!r} and {second!r}",
            remedy="let both judge the same answers",
        )
    pairs = list(zip(one, two, strict=True))
    counts = {(a, b): pairs.count((a, b)) for a in VERDICTS for b in VERDICTS}
    same = Rate(sum(a == b for a, b in pairs), len(pairs))
    chance = sum(one.count(v) * two.count(v) for v in VERDICTS) / len(pairs) ** 2
    kappa = None if chance == 1.0 else (same.value - chance) / (1 - chance)
    return Agreement(first, second, counts, same, kappa)
