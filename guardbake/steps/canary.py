"""Canary feeds of a bundle: the guard's nodes alone must give the scores that were recorded."""

from __future__ import annotations

from pathlib import Path

from guardbake.bundle.manifest import DECODER
from guardbake.check.junit import Suite
from guardbake.errors import EnvironmentFault, IntegrityError
from guardbake.plugins import find_session
from guardbake.steps.certify import NO_BUDGET, compared
from guardbake.steps.nodes import hold_nodes
from guardbake.steps.recheck import GOLDEN, read_golden


def run_canaries(bundle: Path, suite: Suite) -> str:
    """Run them where onnxruntime is installed; says what was seen, or why they were not asked.

    Nothing of the model is read or run but its guard. Raises IntegrityError if a node of the guard
    does something else than the law says or than was recorded.
    """
    try:
        open_session = find_session("onnx")
    except EnvironmentFault as error:
        return _not_asked(suite, f"{error.found}; {error.remedy}")
    spec, golden, standard = read_golden(bundle)
    budgets = standard.budgets(golden.number)
    found = hold_nodes(bundle / DECODER, spec, golden.vectors, open_session, budgets)
    if not found:
        return _not_asked(suite, NO_BUDGET)
    suite.add(compared([{**vars(row), "passed": row.passed} for row in found]))
    for row in found:
        if not row.passed:
            raise IntegrityError(
                found=f"{row.quantity} off by {row.worst:.3g}",
                expected=f"at most {row.limit:.3g} ({row.source})",
                where=f"the guard of {bundle / DECODER}, run on {GOLDEN}",
                remedy="do not ship this bundle: bake it again, or take it from its source",
            )
    return f"{len(found)} quantities of the guard's nodes are as the law and the records say"


def _not_asked(suite: Suite, why: str) -> str:
    suite.check("canary", "skipped", why)
    return f"not asked ({why})"
