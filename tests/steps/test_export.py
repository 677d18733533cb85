"""What an export begins in another process, and what it does when the checkpoint changes."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from guardbake.errors import IntegrityError
from guardbake.plugins import Ahead, Number
from guardbake.progress import reporter_for
from guardbake.steps import export
from guardbake.vlm.catalog import models_root


class Begun:
    def __init__(self) -> None:
        self.left = False

    def __enter__(self) -> Begun:
        return self

    def __exit__(self, *_: object) -> None:
        self.left = True


class Exporter:
    """Writes nothing that is read; `fault` happens while it captures."""

    def __init__(self) -> None:
        self.begun: list[Begun] = []
        self.given: list[Ahead | None] = []
        self.fault = lambda: None

    def admit(self, *_: object) -> None: ...

    def ahead(self, checkpoint: Path, number: Number) -> Begun:
        self.begun.append(Begun())
        return self.begun[-1]

    def capture(
        self, checkpoint: Path, number: Number, folder: Path, ahead: Ahead | None = None
    ) -> None:
        self.given.append(ahead)
        (folder / "decoder.onnx").write_bytes(b"captured")
        self.fault()

    def export(self, *arguments: object) -> None:
        folder = arguments[3]
        assert isinstance(folder, Path)
        (folder / "decoder.onnx").write_bytes(b"written")


@pytest.fixture
def exporter(monkeypatch: pytest.MonkeyPatch) -> Exporter:
    made = Exporter()
    monkeypatch.setattr(export, "find_exporter", lambda _: made)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    return made


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return Path(shutil.copytree(models_root() / "tiny-llava", tmp_path / "checkpoint"))


def run(checkpoint: Path, out: Path) -> None:
    reporter = reporter_for("plain")
    export.export_checkpoint(str(checkpoint), out, "stream", "float32", "ort", reporter)


def test_capture_is_begun_where_there_is_a_core_and_something_to_do(
    exporter: Exporter, checkpoint: Path, tmp_path: Path
) -> None:
    run(checkpoint, tmp_path / "first")
    assert exporter.given == exporter.begun
    assert [each.left for each in exporter.begun] == [True]
    run(checkpoint, tmp_path / "second")  # captured before
    assert len(exporter.begun) == 1


def test_one_core_does_one_thing_at_a_time(
    exporter: Exporter, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    run(checkpoint, tmp_path / "out")
    assert exporter.given == [None]
    assert not exporter.begun


def test_what_was_begun_ends_with_an_error(
    exporter: Exporter, checkpoint: Path, tmp_path: Path
) -> None:
    def fail() -> None:
        raise ValueError("refused")

    exporter.fault = fail
    with pytest.raises(ValueError, match="refused"):
        run(checkpoint, tmp_path / "out")
    assert exporter.begun[0].left
    assert not (tmp_path / "out").exists()


def test_a_configuration_that_changes_is_captured_for_nobody(
    exporter: Exporter, checkpoint: Path, tmp_path: Path
) -> None:
    """Or its graphs would be taken for those of the new one, in every later run."""
    config = checkpoint / "config.json"
    text = config.read_text()
    exporter.fault = lambda: config.write_text(text + "\n") and None
    with pytest.raises(IntegrityError, match="another configuration"):
        run(checkpoint, tmp_path / "out")
    config.write_text(text)
    exporter.fault = lambda: None
    run(checkpoint, tmp_path / "out")
    assert len(exporter.given) == 2
