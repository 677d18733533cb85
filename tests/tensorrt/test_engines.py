"""The seam through which a bake builds its engine."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from guardbake.plugins import EngineBuilder

from guardbake_tensorrt import EngineRecord
from guardbake_tensorrt.engines import PROFILE, RtxEngines, TensorRtEngines


def test_a_bake_gets_the_engine_and_its_record(guarded: Any, tmp_path: Path) -> None:
    builder: EngineBuilder = RtxEngines()
    assert builder.missing() is None
    phases: set[str] = set()
    builder.build(
        guarded.path, tmp_path, ["SM89"], guarded.nodes, lambda phase, *_: phases.add(phase)
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "decoder.engine",
        "decoder.engine.json",
    ]
    record = EngineRecord.from_json((tmp_path / "decoder.engine.json").read_text())
    assert record.engine_bytes == (tmp_path / "decoder.engine").stat().st_size
    assert record.profile == PROFILE
    assert phases


def test_a_missing_library_is_a_reason_not_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    builder: EngineBuilder = TensorRtEngines()
    reason = builder.missing()
    assert reason is not None
    assert "tensorrt" in reason
