"""Every planted fault is refused, and first by the gate that owns it."""

from __future__ import annotations

from pathlib import Path

import pytest

from guardbake.bundle.verify import CHECKS, verify_bundle
from guardbake.check.levels import LEVEL_OF
from guardbake.errors import IntegrityError
from guardbake.fit.sign_test import Budget, Outcome

from tests.mutation import (
    faults_in_files,
    faults_in_fit,
    faults_in_graph,
    faults_in_pack,
    faults_in_runs,
)
from tests.mutation.fault import Fault
from tests.mutation.faults_in_fit import FitCase
from tests.mutation.faults_in_runs import RunCase
from tests.mutation.gates import (
    failed_gates,
    first_refusal,
    gates_of_a_bundle,
    gates_of_fitting,
)

IN_BUNDLES = (*faults_in_pack.FAULTS, *faults_in_graph.FAULTS, *faults_in_files.FAULTS)
IN_FIT = faults_in_fit.FAULTS
IN_RUNS = faults_in_runs.FAULTS
Matrix = list[tuple[Fault[object], str, int]]


def _id(fault: Fault[object]) -> str:
    return f"{fault.place}: {fault.name}"


def test_a_sound_case_passes_every_gate(
    case: FitCase, bundle: Path, baseline: Outcome, budget: Budget
) -> None:
    assert first_refusal(gates_of_fitting(baseline, budget), case) == ("none", 0)
    assert first_refusal(gates_of_a_bundle(bundle), bundle) == ("none", 0)


@pytest.mark.parametrize("fault", IN_FIT, ids=_id)
def test_a_fault_of_fitting(
    fault: Fault[FitCase], case: FitCase, baseline: Outcome, budget: Budget, matrix: Matrix
) -> None:
    fault.plant(case)
    caught, code = first_refusal(gates_of_fitting(baseline, budget), case)
    matrix.append((fault, caught, code))
    assert caught == fault.gate
    assert code in (2, 5, 9)


@pytest.mark.parametrize("fault", IN_BUNDLES, ids=_id)
def test_a_fault_of_a_bundle(fault: Fault[Path], bundle: Path, matrix: Matrix) -> None:
    fault.plant(bundle)
    caught, code = first_refusal(gates_of_a_bundle(bundle), bundle)
    matrix.append((fault, caught, code))
    assert caught == fault.gate
    if caught in CHECKS:
        with pytest.raises(IntegrityError):
            verify_bundle(bundle)
        assert code == 6
    else:
        assert code in (4, 6)


def test_sound_runs_pass_every_gate_of_the_certificate(run_case: RunCase) -> None:
    assert {gate.name: gate.status for gate in run_case.certify()} == dict.fromkeys(
        LEVEL_OF, "pass"
    )


@pytest.mark.parametrize("fault", IN_RUNS, ids=_id)
def test_a_fault_of_runs_is_one_gate_s_alone(
    fault: Fault[RunCase], run_case: RunCase, matrix: Matrix
) -> None:
    fault.plant(run_case)
    failed = failed_gates(run_case)
    code = run_case.exit_code()
    matrix.append((fault, ", ".join(failed), code))
    assert failed == [fault.gate]
    assert code in (4, 5)


def test_every_gate_has_faults_and_no_name_stands_twice(
    bundle: Path, baseline: Outcome, budget: Budget
) -> None:
    names = [_id(fault) for fault in (*IN_FIT, *IN_BUNDLES, *IN_RUNS)]
    assert len(set(names)) == len(names) >= 30
    owners = {fault.gate for fault in (*IN_FIT, *IN_BUNDLES)}
    assert owners == {*gates_of_fitting(baseline, budget), *gates_of_a_bundle(bundle)}
    assert {fault.gate for fault in IN_RUNS} == set(LEVEL_OF)
