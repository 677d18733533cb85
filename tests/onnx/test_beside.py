"""The vision graph captured by a process of its own."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import pytest

from guardbake_onnx import OnnxExporter
from guardbake_onnx.beside import VisionBeside
from tests.onnx.conftest import Exported


def test_another_process_gives_the_same_bytes(exported: Exported) -> None:
    with VisionBeside(exported.vlm.folder, "float32") as ahead:
        assert ahead.graph() == (exported.captured / "vision.onnx").read_bytes()


def test_a_process_that_fails_gives_no_graph(
    exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the exporter captures it then."""
    with VisionBeside(tmp_path, "float32") as ahead:
        assert ahead.graph() is None
    script = tmp_path / "python"
    script.write_text(f"#!{sys.executable}\nprint('half a graph')\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    with OnnxExporter().ahead(exported.vlm.folder, "float32") as ahead:
        OnnxExporter().capture(exported.vlm.folder, "float32", tmp_path, ahead)
    alone = (exported.captured / "vision.onnx").read_bytes()
    assert (tmp_path / "vision.onnx").read_bytes() == alone


def test_leaving_the_context_ends_the_process(exported: Exported) -> None:
    with VisionBeside(exported.vlm.folder, "float32") as ahead:
        pass
    assert ahead.process.returncode == -signal.SIGKILL
    assert ahead.process.stdout is None or ahead.process.stdout.closed
