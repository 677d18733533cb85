"""JUnit XML: the common layout, counts that add up, and text that XML can hold."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import pytest

from guardbake.check.certificate import Gate
from guardbake.check.junit import Suite
from guardbake.errors import IntegrityError

GATES = (
    Gate("law", "pass", "score of gate 0 0.2 of 1"),
    Gate("cache", "fail", "logits, each alone 3 of 0.0001"),
    Gate("kl", "not asked", "the recipe declares no budget"),
)
STOP = IntegrityError(found="a\x00b", expected="<c>", where="d", remedy="e")
COUNTS = ("tests", "failures", "errors", "skipped")


def read(suite: Suite) -> ElementTree.Element:
    """The one suite of the file."""
    root = ElementTree.fromstring(suite.to_xml())
    (found,) = root
    assert (root.tag, found.tag) == ("testsuites", "testsuite")
    assert [root.get(key) for key in COUNTS] == [found.get(key) for key in COUNTS]
    assert found.get("tests") == str(len(found))
    return found


def test_every_gate_is_a_case() -> None:
    suite = Suite("bake")
    suite.add(GATES)
    found = read(suite)
    assert [case.get("name") for case in found] == ["law", "cache", "kl"]
    assert [case.get("classname") for case in found] == [
        "guardbake.bake.A node",
        "guardbake.bake.E cache",
        "guardbake.bake.C logits",
    ]
    assert [case[0].tag for case in found] == ["system-out", "failure", "skipped"]
    assert [found.get(key) for key in COUNTS] == ["3", "1", "0", "1"]


@pytest.mark.parametrize(("gates", "errors"), [(GATES[:1], 1), (GATES, 0)])
def test_what_stopped_a_command_is_an_error_unless_a_gate_failed(
    gates: tuple[Gate, ...], errors: int
) -> None:
    suite = Suite("verify")
    suite.add(gates)
    suite.stopped(STOP)
    texts = [str(case[0].text) for case in read(suite) if case[0].tag == "error"]
    assert len(texts) == errors
    assert all("a?b" in text and "<c>" in text for text in texts)


def test_the_same_gates_are_the_same_bytes(tmp_path: Path) -> None:
    suite = Suite("parity")
    suite.add(GATES)
    suite.write(tmp_path / "a.xml")
    assert (tmp_path / "a.xml").read_bytes() == suite.to_xml()
    assert suite.to_xml().startswith(b"<?xml")
