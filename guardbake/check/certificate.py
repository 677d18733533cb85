"""The certificate: what was compared, on which digests, under which budgets, and one verdict.

The verdict is computed once, here, from the gates; the last line on the screen, the JSON, the
Markdown, the JUnit file and the exit status all read this one value. `check.record` is the schema.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from guardbake.check.levels import LETTERS, LEVEL_OF, Level

SCHEMA = 2
Verdict = Literal["pass", "fail"]
Status = Literal["pass", "fail", "not asked"]


@dataclass(frozen=True)
class Gate:
    """One declared check, by its name in `check.levels`. detail: what was seen.

    status: "not asked" if no budget is declared for it, or nothing here can ask it; that is shown
    and never counted as passed. A check that was asked and did not run has failed.
    """

    name: str
    status: Status
    detail: str

    @property
    def level(self) -> Level:
        return LEVEL_OF[self.name]


def verdict(gates: Sequence[Gate]) -> Verdict:
    """pass iff a gate was asked and every one that was asked passed."""
    asked = [gate.status for gate in gates if gate.status != "not asked"]
    return "pass" if asked and all(status == "pass" for status in asked) else "fail"


def graded(gates: Sequence[Gate]) -> dict[Level, Status]:
    """Level by level: fail if a gate failed, pass if every gate passed, else not asked.

    A level that leaves one of its gates unasked is not passed, whatever the others say.
    """
    found: dict[Level, Status] = {}
    for level in LETTERS:
        own = [gate.status for gate in gates if gate.level == level]
        if "fail" in own:
            found[level] = "fail"
        else:
            found[level] = "pass" if own and all(s == "pass" for s in own) else "not asked"
    return found


def certificate(
    name: str,
    gates: Sequence[Gate],
    digests: Mapping[str, Any],
    figures: Mapping[str, Any],
) -> dict[str, Any]:
    """digests: of what is certified; `guard` and `onnx` (by file name) are what verifying reads.
    figures: the reports behind the gates.
    """
    return {
        "schema": SCHEMA,
        "name": name,
        "verdict": verdict(gates),
        "levels": graded(gates),
        "gates": [{**asdict(gate), "level": gate.level} for gate in gates],
        "digests": dict(digests),
        "figures": dict(figures),
    }
