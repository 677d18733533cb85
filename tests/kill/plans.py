"""When a bake is killed: seeded, over all its stages, in time and between file operations."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass

OPERATIONS = 60  # so many names publishing opens, makes and renames; other stages fewer


@dataclass(frozen=True)
class Plan:
    """Everything before `stage` is done already; the kill falls `delay` seconds into it, or just
    before its file operation number `after`. over: whether an older bundle stands at the output.
    """

    number: int
    stage: str
    delay: float | None
    after: int | None
    over: bool

    def __str__(self) -> str:
        when = (
            f"{self.delay:.2f} s into" if self.delay is not None else f"operation {self.after} of"
        )
        return f"{self.number}: {when} {self.stage}{' over an older bundle' if self.over else ''}"


def plan(number: int, seconds: Mapping[str, float]) -> Plan:
    """The plan of that number, the same every time. seconds: how long each stage takes."""
    rng = random.Random(number)
    stage = rng.choice(sorted(seconds))
    delay = rng.uniform(0, 1.1 * seconds[stage]) if rng.random() < 0.5 else None
    after = round(OPERATIONS ** rng.random()) if delay is None else None
    return Plan(number, stage, delay, after, rng.random() < 0.5)
