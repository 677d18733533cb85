"""`guardbake diff`: what it prints, and when it stops a line."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from guardbake.artifact import save_guard
from guardbake.spec import GuardSpec

Run = Callable[..., int]


@pytest.fixture
def packs(guard: Callable[..., GuardSpec], tmp_path: Path) -> tuple[Path, Path]:
    """Two packs: the second pushes the other way, and a little harder."""
    before = guard("sequence", "steer")
    edit = before.edits[0]
    assert edit.push is not None
    after = replace(before, edits=(replace(edit, push=-edit.push, strength=1.5),))
    save_guard(before, tmp_path / "a")
    save_guard(after, tmp_path / "b")
    return tmp_path / "a", tmp_path / "b"


def test_the_same_pack(
    run: Run, packs: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("diff", packs[0], packs[0], "--check") == 0
    assert capsys.readouterr().out == "diff: the same\n"


def test_a_change_is_told_and_stops_only_who_asks(
    run: Run, packs: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("diff", *packs) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "edits layers.2.ffn_output strength: 1 -> 1.5" in lines
    assert "layers.2.ffn_output.push: cosine -1.000000 length x 1.0000" in lines
    assert lines[-1] == "diff: they differ"
    assert run("diff", *packs, "--check") == 6


def test_as_json(run: Run, packs: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert run("diff", *packs, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["same"] is False
    assert found["bundle"] == []
    assert {each["what"] for each in found["guard"]} == {
        "guard",
        "edits layers.2.ffn_output strength",
    }
    (moved,) = found["moved"]
    np.testing.assert_allclose(moved["cosines"], [-1], rtol=1e-6)


def test_what_is_no_guard_is_refused(run: Run, packs: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "c").write_bytes(b"no guard")
    assert run("diff", packs[0], tmp_path / "c") == 9
    assert run("diff", packs[0], tmp_path / "absent") == 9
