"""The checks for a machine with a GPU, run on the CPU: their control flow, not their figures."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "tools" / "bench" / "gpu.py"
ASKED = (
    "machine", "parity-llava", "latency-llava", "hooks-qwen2_5_vl", "engine-llava", "bundle-cuda",
)  # fmt: skip


def checks(out: Path, *more: str) -> str:
    command = [sys.executable, str(SCRIPT), str(out), "--provider", "cpu", "--size", "tiny", *more]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("gpu")
    only = [part for name in ASKED for part in ("--only", name)]
    checks(out, "--number", "float32", "--number", "float16", *only)
    return out, json.loads((out / "results.json").read_text())


def test_what_ran_has_figures_and_what_did_not_says_why(
    found: tuple[Path, dict[str, Any]],
) -> None:
    out, results = found
    assert {name: results[name]["status"] for name in results} == {
        "machine": "done",
        "parity-llava": "done",
        "latency-llava": "done",
        "hooks-qwen2_5_vl": "done",
        "engine-llava": "not run",
        "bundle-cuda": "not run",
        "fit": "not run",
    }, results
    parity = results["parity-llava"]["figures"]
    assert parity["float32"]["levels"].items() >= {"node": "pass", "cache": "pass"}.items()
    assert parity["float16"]["multiples of the reference's own noise"] > 0
    latency = results["latency-llava"]["figures"]
    assert latency["operators added"]["MatMul"] > 0
    assert all(latency[f"decode after 32, batch {b}"]["control / unguarded"] > 0 for b in (1, 8))
    engine = results["engine-llava"]
    assert "compiled, not loaded" in engine["said"]
    assert (
        engine["figures"]["float16"]["of the guard"] > engine["figures"]["float16"]["guard nodes"]
    )
    assert all(results[name]["said"] for name in results if results[name]["status"] == "not run")
    page = (out / "results.md").read_text()
    assert all(f"| {name} |" in page for name in results)
    assert not list(out.glob("tmp*"))


def test_what_is_done_is_kept_and_what_takes_too_long_is_a_failure(
    found: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    out, _ = found
    numbers = ("--number", "float32", "--number", "float16")
    assert "latency-llava: done, before" in checks(out, *numbers, "--only", "latency-llava")
    assert "machine: failed" in checks(tmp_path, "--minutes", "0.001", "--only", "machine")
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["machine"]["said"] == "more than 0.001 minutes"


def test_cuda_is_never_replaced_by_the_cpu(tmp_path: Path) -> None:
    said = checks(tmp_path, "--only", "latency-llava", "--provider", "cuda")
    assert "latency-llava: not run" in said
    assert "CUDAExecutionProvider" in said
