"""One verdict, from the gates and from nothing else; and a record that bears it out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import get_args

import pytest

from guardbake.check import record
from guardbake.check.certificate import Gate, Status, certificate, graded, verdict
from guardbake.check.levels import GATES, LEVEL_OF
from guardbake.check.record import SCHEMA_FILE, read_certificate
from guardbake.errors import MalformedError

from tests.bakes import Baked
from tests.certificates import small_certificate

NAMES = tuple(LEVEL_OF)


def test_no_gate_is_no_pass() -> None:
    assert verdict([]) == "fail"


def test_gates_that_nobody_asked_are_no_pass() -> None:
    assert verdict([Gate(name, "not asked", "no budget") for name in NAMES]) == "fail"


@pytest.mark.parametrize("failing", range(3))
def test_one_failed_gate_fails_all(failing: int) -> None:
    gates = [Gate(NAMES[n], "fail" if n == failing else "pass", "seen") for n in range(3)]
    assert verdict(gates) == "fail"
    assert certificate("x", gates, {}, {})["verdict"] == "fail"


def test_what_was_not_asked_is_neither_passed_nor_failed() -> None:
    gates = [Gate("presence", "pass", "seen"), Gate("cache", "not asked", "no budget")]
    assert verdict(gates) == "pass"
    levels = graded(gates)
    assert levels.pop("graph") == "pass"
    assert set(levels.values()) == {"not asked"}


@pytest.mark.parametrize("last", get_args(Status))
def test_a_level_passes_only_whole(last: Status) -> None:
    gates = [Gate(name, "pass", "seen") for name in GATES["logits"]]
    gates[-1] = Gate(gates[-1].name, last, "seen")
    assert graded(gates)["logits"] == last


def test_the_published_schema_is_the_one_that_is_checked() -> None:
    """`python -m guardbake.check.record` writes it anew when the record changes."""
    path = Path(record.__file__).with_name(SCHEMA_FILE)
    assert json.loads(path.read_text()) == record.json_schema()


def test_a_real_certificate_is_as_the_schema_says(baked: Baked) -> None:
    content = json.loads((baked.bundle / "certificate.json").read_text())
    found = read_certificate(content, "here")
    assert found.verdict == "pass"
    assert {gate.name for gate in found.gates} == set(LEVEL_OF) - {"engine"}
    assert {gate.status for gate in found.gates} == {"pass"}
    assert set(found.levels.values()) == {"pass"}


def test_an_infinity_is_refused() -> None:
    content = small_certificate("0" * 64, "1" * 64, {})
    assert read_certificate(content, "here").version == content["schema"]
    content["figures"]["parity"]["comparisons"][0]["worst"] = float("inf")
    with pytest.raises(MalformedError, match="worst"):
        read_certificate(content, "here")
