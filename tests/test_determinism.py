"""Equal inputs, equal bytes: in another folder, under another locale, with more threads."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.tiny_runs import tiny_recipe

# Everything a bake does up to the guarded graphs; engines are declared not to be the same twice.
SCRIPT = """
import io, sys
from pathlib import Path
from guardbake.pipeline import Bake
from guardbake.progress import PlainReporter
work = Bake(Path(sys.argv[1]), Path(sys.argv[2]), PlainReporter(io.StringIO()))
fitted, spec = work.fit()
exported = work.export()
print(fitted, exported.parent, work.rewrite(exported, spec), sep="\\n")
"""
CANDIDATES = """
[[fit.candidates]]
edit = "care"
layers = [4]
strengths = [1.0]
rank = 8

[[fit.candidates]]
edit = "steer"
layers = [4]
strengths = [0.5]

"""
SETTINGS = {
    "one thread": {"LC_ALL": "C.UTF-8", "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "1"},
    # An ASCII locale, which Python is told not to mend; another hash seed, clock and thread count.
    "two threads": {
        "LC_ALL": "C",
        "PYTHONCOERCECLOCALE": "0",
        "PYTHONUTF8": "0",
        "PYTHONHASHSEED": "7",
        "TZ": "Asia/Kathmandu",
        "OMP_NUM_THREADS": "2",
    },
}


def made(recipe: Path, out: Path, setting: dict[str, str]) -> dict[str, bytes]:
    """Every file that the stages leave, by stage, without the stage's digest, and name."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(recipe), str(out)],
        capture_output=True,
        text=True,
        env=os.environ | setting,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    stages = [Path(line) for line in done.stdout.splitlines()]
    return {
        f"{stage.name}/{path.relative_to(stage).as_posix()}": path.read_bytes()
        for stage in stages
        for path in sorted(stage.rglob("*"))
        if path.is_file()
    }


def test_another_folder_locale_and_number_of_threads(tmp_path: Path) -> None:
    (tmp_path / "recipe").mkdir()
    recipe = tiny_recipe(tmp_path / "recipe", CANDIDATES, "")
    first, second = (
        made(recipe, tmp_path / f"{name}, a folder" / "bundle", setting)
        for name, setting in SETTINGS.items()
    )
    assert sorted(first) == sorted(second)  # the stages' names hold the digests of their inputs
    names = {name.split("/", 1)[1] for name in first}
    assert {"guard.safetensors", "decoder.onnx", "onnx/decoder.onnx.data", "fit.json"} <= names
    assert [name for name in first if first[name] != second[name]] == []
