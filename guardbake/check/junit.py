"""Gates as a JUnit XML file, which CI systems show: each gate a test case.

The common layout of Apache Ant and Jenkins: testsuites, testsuite with counts, testcase, and in it
failure, error or skipped. Without times, so that equal results are equal bytes.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

from guardbake.check.certificate import Gate
from guardbake.check.levels import title
from guardbake.errors import GuardbakeError

_UNSPEAKABLE = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


class Suite:
    """The test cases of one command: gates as they are added, and what stopped it."""

    def __init__(self, command: str) -> None:
        self.command = command
        self._cases: list[tuple[str, str, str, str]] = []  # class, name, outcome, detail

    def add(self, gates: Sequence[Gate]) -> None:
        """A gate that was not asked is a skipped case."""
        outcomes = {"pass": "", "fail": "failure", "not asked": "skipped"}
        self._cases += [
            (f"guardbake.{self.command}.{title(g.level)}", g.name, outcomes[g.status], g.detail)
            for g in gates
        ]

    def check(self, name: str, outcome: str, detail: str) -> None:
        """A case of its own; outcome: empty if it passed, "failure", "error" or "skipped"."""
        self._cases.append((f"guardbake.{self.command}", name, outcome, detail))

    def stopped(self, error: GuardbakeError) -> None:
        """What ended the command, unless a failed gate says so already."""
        if not any(outcome == "failure" for _, _, outcome, _ in self._cases):
            self.check(self.command, "error", f"{type(error).__name__}: {error}")

    def to_xml(self) -> bytes:
        counts = {
            "tests": len(self._cases),
            **{
                f"{kind}s" if kind != "skipped" else kind: sum(c[2] == kind for c in self._cases)
                for kind in ("failure", "error", "skipped")
            },
        }
        numbers = {name: str(count) for name, count in counts.items()}
        root = ElementTree.Element("testsuites", numbers)
        suite = ElementTree.SubElement(root, "testsuite", {"name": "guardbake", **numbers})
        for group, name, outcome, detail in self._cases:
            case = ElementTree.SubElement(suite, "testcase", {"classname": group, "name": name})
            if outcome:
                said = {"message": _plain(detail)}
                ElementTree.SubElement(case, outcome, said).text = _plain(detail)
            else:
                ElementTree.SubElement(case, "system-out").text = _plain(detail)
        ElementTree.indent(root)
        data: bytes = ElementTree.tostring(root, encoding="utf-8", xml_declaration=True)
        return data + b"\n"

    def write(self, path: Path) -> None:
        """`path` becomes this suite whole, in the place of an earlier one."""
        partial = path.with_name(f".{path.name}.partial")
        partial.write_bytes(self.to_xml())
        os.replace(partial, path)


def _plain(text: str) -> str:
    """Without the characters that XML cannot hold."""
    return _UNSPEAKABLE.sub("?", text)
