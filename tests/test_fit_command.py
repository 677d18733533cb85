"""`guardbake fit`: the front half of a bake, on the tiny VLM."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from guardbake.artifact import load_guard
from guardbake.vlm.catalog import models_root


def test_fit_writes_the_guard_pack_alone(tmp_path: Path) -> None:
    out = tmp_path / "guard.safetensors"
    recipe = models_root() / "tiny-llava.toml"
    command = [sys.executable, "-m", "guardbake", "fit", str(recipe), "-o", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    spec = load_guard(out)
    assert spec.digest[:12] in done.stdout
    assert spec.profile == "sequence"
    lines = done.stdout.splitlines()
    for edit in ("steer", "remove", "add", "replace", "care"):  # each was measured, and is shown
        assert any(f"  {edit} layer" in line and line[0] in "+-" for line in lines), edit
    assert any(line.endswith(f"{spec.provenance['chosen']}: may be written") for line in lines)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".guardbake", "guard.safetensors"]
