"""`guardbake verify`, `parity` and `--junit`: what a CI system gets to see, passed or not."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import onnxruntime
import pytest

from guardbake.bundle.papers import SBOM
from guardbake.bundle.verify import CHECKS

from guardbake_tensorrt import EngineRecord, runner
from guardbake_tensorrt.device import CudaDevice
from tests.bakes import Baked
from tests.tensorrt.standins import GraphEngine, HostRuntime, backend_of

Run = Callable[..., int]


def cases(path: Path) -> dict[str, str]:
    """Outcome by test case."""
    root = ElementTree.fromstring(path.read_bytes())
    return {str(case.get("name")): case[0].tag for case in root.iter("testcase")}


def test_verify_shows_every_check_and_the_canaries(
    baked: Baked, run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("verify", baked.bundle, "--junit", tmp_path / "a.xml") == 0
    out = capsys.readouterr().out
    assert "quantities of the guard's nodes are as the law and the records say" in out
    found = cases(tmp_path / "a.xml")
    assert list(found) == [*CHECKS, "law", "canary"]
    assert set(found.values()) == {"system-out"}


def test_parity_shows_every_gate_that_needs_no_source_model(
    baked: Baked, run: Run, tmp_path: Path
) -> None:
    assert run("parity", baked.bundle, "--junit", tmp_path / "a.xml") == 0
    found = cases(tmp_path / "a.xml")
    assert {"law", "canary", "kl", "top-1", "top-5", "noise", "cache", "tokens"} <= set(found)
    assert set(found.values()) == {"system-out"}


def test_parity_says_where_it_ran_and_ends_with_7_where_it_cannot(
    baked: Baked, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("parity", baked.bundle) == 0
    out = capsys.readouterr().out
    assert f"decoder: onnxruntime {onnxruntime.__version__}, CPUExecutionProvider" in out
    assert run("parity", baked.bundle, "--runner", "cuda") == 7
    err = " ".join(capsys.readouterr().err.split())
    assert "onnxruntime's CUDAExecutionProvider" in err
    assert "install onnxruntime-gpu" in err
    assert run("parity", baked.bundle, "--runner", "rtx") == 7
    assert "NVIDIA GPU" in " ".join(capsys.readouterr().err.split())
    assert run("parity", baked.bundle, "--runner", "absent") == 7
    assert run("parity", baked.bundle, "--engines", baked.bundle) == 2


def test_parity_runs_the_engine_of_a_bundle_where_there_is_a_gpu(
    baked: Baked, run: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every gate, by one command; the GPU is a stand-in, what computes is the bundle's graph."""
    record = EngineRecord.from_json((baked.bundle / "decoder.engine.json").read_text())
    gpu = HostRuntime()
    engine = GraphEngine(baked.bundle / "decoder.onnx", gpu, record.profile)
    monkeypatch.setattr(runner, "open_device", lambda: CudaDevice(gpu))
    monkeypatch.setattr(runner, "load_backend", lambda _: backend_of(engine, record.version))
    assert run("parity", baked.bundle, "--runner", "rtx") == 0
    out = capsys.readouterr().out
    assert f"engine {record.engine_sha256[:12]}, TF32 False" in out
    assert "on stand-in" in out
    assert "vision: onnxruntime" in out
    assert set(engine.profiles_used) == {0, 1, 2}


def test_what_stops_a_bake_before_its_gates_is_an_error(run: Run, tmp_path: Path) -> None:
    report = tmp_path / "a.xml"
    assert run("bake", tmp_path / "absent.toml", "-o", tmp_path / "b", "--junit", report) == 2
    assert cases(report) == {"bake": "error"}
    assert [path.name for path in tmp_path.iterdir()] == ["a.xml"]
    nowhere = tmp_path / "absent" / "a.xml"
    assert run("verify", tmp_path, "--junit", nowhere) == 2
    assert not nowhere.parent.exists()


def test_a_check_that_fails_is_a_failure_and_what_follows_is_skipped(
    baked: Baked, run: Run, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(baked.bundle, tmp_path / "copy"))
    (copy / SBOM).write_text("{}")
    assert run("verify", copy, "--junit", tmp_path / "a.xml") == 6
    first, *rest = cases(tmp_path / "a.xml").items()
    assert first == ("bytes", "failure")
    assert rest
    assert {outcome for _, outcome in rest} == {"skipped"}
