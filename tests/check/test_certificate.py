"""One verdict, from the gates and from nothing else."""

from __future__ import annotations

import pytest

from guardbake.check.certificate import Gate, certificate, verdict


def test_no_gate_is_no_pass() -> None:
    assert verdict([]) == "fail"


@pytest.mark.parametrize("failing", range(3))
def test_one_failed_gate_fails_all(failing: int) -> None:
    gates = [Gate(f"gate {n}", n != failing, "seen") for n in range(3)]
    assert verdict(gates) == "fail"
    assert certificate("x", gates, {}, {})["verdict"] == "fail"


def test_all_passed() -> None:
    assert certificate("x", [Gate("gate", True, "seen")], {}, {})["verdict"] == "pass"
