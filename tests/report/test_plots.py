"""Plots are the same bytes for the same numbers, and say what is missing."""

from __future__ import annotations

import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from guardbake.errors import EnvironmentFault
from guardbake.report.plots import Curve, draw_curves

LAYERS = (0.0, 1.0, 2.0)


def draw(path: Path, top: float = 1.0) -> bytes:
    panels = {
        "text": [Curve("FFN", LAYERS, (0.1, top, 0.2), (0.0, 0.5, 0.1), (0.3, 1.5, 0.4))],
        "typographic": [Curve("attention", LAYERS, (0.0, -0.1, 0.2))],
    }
    draw_curves(path, panels, "layer", "drop of the refusal score", (1.0,))
    return path.read_bytes()


def test_the_same_numbers_are_the_same_bytes(tmp_path: Path) -> None:
    once = draw(tmp_path / "a.svg")
    assert once == draw(tmp_path / "b.svg")
    assert once != draw(tmp_path / "c.svg", top=1.01)
    assert b"<dc:date>" not in once


def test_a_plot_is_svg_and_its_words_are_text(tmp_path: Path) -> None:
    draw(tmp_path / "a.svg")
    root = ET.parse(tmp_path / "a.svg").getroot()
    assert root.tag.endswith("}svg")
    words = {e.text for e in root.iter() if e.tag.endswith("}text")}
    assert {"text", "typographic", "FFN", "layer", "drop of the refusal score"} <= words


def test_without_matplotlib_the_fault_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [n for n in sys.modules if n.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(EnvironmentFault, match=r"guardbake\[report\]") as caught:
        draw(tmp_path / "a.svg")
    assert caught.value.exit_code == 7
    assert not list(tmp_path.iterdir())
