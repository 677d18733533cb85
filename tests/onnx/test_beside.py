"""The vision graph captured by a process of its own."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import pytest

from guardbake_onnx import OnnxExporter
from guardbake_onnx.beside import VisionBeside
from tests.onnx.conftest import Exported


@pytest.mark.parametrize("python", [sys.executable, "false"])
def test_another_process_gives_the_same_bytes(
    exported: Exported, python: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where it ends without a graph."""
    monkeypatch.setattr(sys, "executable", python)
    monkeypatch.setattr("guardbake_onnx._capture_decoder", lambda *_: None)
    exporter = OnnxExporter()
    with exporter.ahead(exported.vlm.folder, "float32") as ahead:
        exporter.capture(exported.vlm.folder, "float32", tmp_path, ahead)
    alone = (exported.captured / "vision.onnx").read_bytes()
    assert (tmp_path / "vision.onnx").read_bytes() == alone


def test_leaving_the_context_ends_the_process(exported: Exported) -> None:
    with VisionBeside(exported.vlm.folder, "float32") as ahead:
        pass
    assert ahead.process.returncode == -signal.SIGKILL
    assert ahead.process.stdout is None or ahead.process.stdout.closed
