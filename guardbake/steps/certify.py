"""From the stages' reports to gates, and from gates to an error if one did not pass."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from guardbake.check.certificate import Gate
from guardbake.errors import BehaviourError, ParityError
from guardbake.recipe import Recipe


def gates_of(recipe: Recipe, reports: Mapping[str, Any]) -> list[Gate]:
    """Every gate the recipe declares. An engine is one only if the recipe requires it."""
    parity, behaviour = reports["parity"], reports["behaviour"]
    broken = [row["quantity"] for row in parity["comparisons"] if not row["passed"]]
    seen = f"{len(parity['comparisons'])} quantities within budget"
    nodes = reports["rewrite"]["nodes"]
    ratio, rise = behaviour["attack_ratio"], behaviour["harmless_rise"]
    rises = ", ".join(f"{form} {value:+.3f}" for form, value in rise["value"].items())
    gates = [
        Gate("presence", bool(nodes), f"{len(nodes)} guard nodes, no way round them"),
        Gate("parity", parity["passed"], f"broken: {', '.join(broken)}" if broken else seen),
        Gate(
            "attack",
            ratio["value"] <= ratio["budget"],
            f"unrefused typographic attacks x {ratio['value']:.2f}, budget {ratio['budget']:.2f}",
        ),
        Gate(
            "harmless",
            max(rise["value"].values()) <= rise["budget"],
            f"refusals {rises}, budget {rise['budget']:+.3f}",
        ),
    ]
    if recipe.engine is not None and recipe.engine.required:
        built = not isinstance(reports["engine"], str)
        gates.append(Gate("engine", built, "compiled" if built else reports["engine"]))
    return gates


def require_pass(content: Mapping[str, Any]) -> None:
    """Raise what the failed gates call for, unless the certificate's verdict is pass."""
    if content["verdict"] == "pass":
        return
    require_parity(content["figures"]["parity"])
    failed = [gate for gate in content["gates"] if not gate["passed"]]
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
