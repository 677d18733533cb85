"""The gates in the order in which they stand, and the first one that refuses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TypeAlias, TypeVar

from guardbake.bundle.verify import CHECKS, Bundle, run_check
from guardbake.check.junit import Suite
from guardbake.errors import GuardbakeError
from guardbake.fit.sign_test import Budget, Outcome, choose
from guardbake.plugins import find_runner, find_session
from guardbake.samples.splits import prove_disjoint
from guardbake.steps.canary import run_canaries
from guardbake.steps.certify import require_parity
from guardbake.steps.recheck import recheck

from tests.mutation.faults_in_fit import FitCase
from tests.mutation.faults_in_runs import RunCase

Subject = TypeVar("Subject")
Gates: TypeAlias = Mapping[str, Callable[[Subject], object]]


def gates_of_fitting(
    baseline: Outcome, budget: Budget
) -> Mapping[str, Callable[[FitCase], object]]:
    """baseline: what the model does without a guard."""
    return {
        "splits": lambda case: prove_disjoint(case.splits),
        "rows": FitCase.fit,
        "spec": lambda case: case.make(case.spec),
        "sign test": lambda case: choose([case.ask(case.make(case.spec))], baseline, budget),
    }


def gates_of_a_bundle(folder: Path) -> Gates[Path]:
    """The checks of `guardbake verify`, its canaries, then `guardbake parity`."""
    bundle = Bundle(folder)
    checks = {name: lambda _, name=name: run_check(name, bundle) for name in CHECKS}
    return {**checks, "canary": partial(run_canaries, suite=Suite("verify")), "parity": rerun}


def rerun(folder: Path) -> None:
    require_parity(recheck(folder, find_runner("onnx"), find_session("onnx")))


def failed_gates(case: RunCase) -> list[str]:
    """The gates of a certificate that fail, in their order."""
    return [gate.name for gate in case.certify() if gate.status == "fail"]


def first_refusal(gates: Gates[Subject], subject: Subject) -> tuple[str, int]:
    """Name and exit code of the first gate that refuses; ("none", 0) if all pass."""
    for name, gate in gates.items():
        try:
            gate(subject)
        except GuardbakeError as error:
            return name, error.exit_code
    return "none", 0
