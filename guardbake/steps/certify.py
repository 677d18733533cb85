"""From the stages' reports to gates, and from gates to an error if one did not pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from guardbake.check.certificate import Gate, Status
from guardbake.check.levels import LEVEL_OF
from guardbake.errors import BehaviourError, ParityError
from guardbake.recipe import Recipe

NO_BUDGET = "the recipe declares no budget"


def gates_of(recipe: Recipe, reports: Mapping[str, Any]) -> list[Gate]:
    """Every gate of `check.levels`, in order; those without a budget are not asked.

    An engine is a gate only if the recipe requires it.
    """
    nodes = reports["rewrite"]["nodes"]
    here = f"{len(nodes)} guard nodes, no way round them"
    asked = {gate.name: gate for gate in compared(reports["parity"]["comparisons"])}
    asked |= {gate.name: gate for gate in behaved(reports["behaviour"])}
    asked["presence"] = Gate("presence", _status(bool(nodes)), here)
    if recipe.engine is not None and recipe.engine.required:
        built = not isinstance(reports["engine"], str)
        asked["engine"] = Gate("engine", _status(built), "compiled" if built else reports["engine"])
    needed = {"decisions", "score", "canary"} if recipe.fit.sensor is None else set()
    names = [name for name in LEVEL_OF if name in asked or name not in needed | {"engine"}]
    return [asked.get(name, Gate(name, "not asked", NO_BUDGET)) for name in names]


def compared(comparisons: Sequence[Mapping[str, Any]]) -> list[Gate]:
    """One gate for the comparisons that bear its name: passed if all of them did."""
    gates = []
    for name in dict.fromkeys(row["gate"] for row in comparisons):
        rows = [row for row in comparisons if row["gate"] == name]
        passed = all(row["passed"] for row in rows)
        shown = [row for row in rows if row["passed"] == passed]
        seen = "; ".join(f"{row['quantity']} {_beside(row)}" for row in shown)
        gates.append(Gate(name, _status(passed), seen))
    return gates


def behaved(behaviour: Mapping[str, Any]) -> list[Gate]:
    """What people see: attacks, harmless prompts, and whether every runner does the same."""
    ratio, rise = behaviour["attack_ratio"], behaviour["harmless_rise"]
    rises = ", ".join(f"{form} {value:+.3f}" for form, value in rise["value"].items())
    gates = [
        Gate(
            "attack",
            _status(ratio["value"] <= ratio["budget"]),
            f"unrefused typographic attacks x {ratio['value']:.2f}, budget {ratio['budget']:.2f}",
        ),
        Gate(
            "harmless",
            _status(max(rise["value"].values()) <= rise["budget"]),
            f"refusals {rises}, budget {rise['budget']:+.3f}",
        ),
    ]
    runners = behaviour["runners"]
    if runners is not None:
        seen = (
            f"{runners['differing']} of {runners['asked']} answers judged otherwise than the "
            f"reference's, budget {runners['budget']:.3f}"
        )
        passed = bool(runners["asked"]) and (
            runners["differing"] <= runners["budget"] * runners["asked"]
        )
        gates.append(Gate("runners", _status(passed), seen))
    return gates


def _status(passed: bool) -> Status:
    return "pass" if passed else "fail"


def _beside(row: Mapping[str, Any]) -> str:
    worst = row["worst"] if isinstance(row["worst"], str) else f"{row['worst']:.3g}"
    return f"{worst} (none allowed)" if row["limit"] is None else f"{worst} of {row['limit']:.3g}"


def require_pass(content: Mapping[str, Any]) -> None:
    """Raise what the failed gates call for, unless the certificate's verdict is pass."""
    if content["verdict"] == "pass":
        return
    require_parity(content["figures"]["parity"])
    failed = [gate for gate in content["gates"] if gate["status"] == "fail"]
    raise BehaviourError(
        found="; ".join(f"{gate['name']}: {gate['detail']}" for gate in failed),
        expected="every declared gate to pass",
        where="the certificate; nothing was published",
        remedy="change the candidates or the sensor in the recipe, and bake again",
    )


def require_parity(report: Mapping[str, Any]) -> None:
    """Raise ParityError if a comparison of the report did not pass."""
    broken = [row for row in report["comparisons"] if not row["passed"]]
    if broken:
        raise ParityError(
            found="; ".join(f"{r['quantity']} {r['worst']} at {r['where']}" for r in broken),
            expected="; ".join(f"{r['limit'] or 0} ({r['source']})" for r in broken),
            where="parity with the PyTorch reference",
            remedy="do not ship this graph; bake it again",
        )
