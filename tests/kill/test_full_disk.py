"""A disk that is full in the middle of a bake: exit 8, nothing half-written, and it goes on.

On a small tmpfs where this process may mount one in a namespace of its own, else under a limit on
the size of a file; the table at the end says which.
"""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.bakes import Baked, differing

SCRIPT = Path(__file__).parent / "small_disk.py"
MOUNTED = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
MOUNT = 'mount -t tmpfs -o size=1g tmpfs "$0" && exec "$@"'


@pytest.fixture(scope="session")
def kind(tmp_path_factory: pytest.TempPathFactory) -> str:
    """tmpfs, or file-size where none can be mounted."""
    if shutil.which("unshare") is None:
        return "file-size"
    place = tmp_path_factory.mktemp("mount")
    tried = subprocess.run([*MOUNTED, MOUNT, place, "true"], capture_output=True, check=False)
    return "tmpfs" if tried.returncode == 0 else "file-size"


def sizes_written(baked: Baked) -> dict[str, list[int]]:
    """What each stage writes, file by file; publishing writes the bundle."""
    folders = {path.name.rpartition("-")[0]: path for path in stages_of(baked).iterdir()}
    folders["publish"] = baked.bundle
    return {
        stage: [path.stat().st_size for path in folders[stage].rglob("*") if path.is_file()]
        for stage in baked.seconds
    }


def stages_of(baked: Baked) -> Path:
    return baked.bundle.parent / ".guardbake"


def test_a_full_disk(
    disk: int,
    kind: str,
    baked: Baked,
    sources: Path,
    untouched: Callable[[], bool],
    tmp_path: Path,
    full: list[str],
) -> None:
    rng = random.Random(disk)
    stage = rng.choice(sorted(baked.seconds))
    sizes = sizes_written(baked)[stage]
    names = list(baked.seconds)
    for folder in stages_of(baked).iterdir():
        if folder.name.rpartition("-")[0] in names[: names.index(stage)]:
            shutil.copytree(folder, tmp_path / "stages" / folder.name)
    (tmp_path / "stages").mkdir(exist_ok=True)
    build = tmp_path / "build"
    build.mkdir()
    room = sum(sizes) if kind == "tmpfs" else max(sizes)
    free = round(rng.uniform(0, 0.9) * room)
    command = [sys.executable, SCRIPT, kind, free, tmp_path / "stages", sources, build]
    if kind == "tmpfs":
        command = [*MOUNTED, MOUNT, build, *command]
    done = subprocess.run(
        [str(each) for each in command], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert found["full"] == 8, (stage, free, found["said"])
    assert not found["published"]
    assert (found["hidden"], found["incomplete"]) == ([], [])
    assert found["room"] == 0, found["said again"]
    result = tmp_path / "result" if kind == "tmpfs" else build / "tiny"
    assert differing(result, baked.bundle) == []
    assert untouched()
    full.append(f"{stage:<12} {free} bytes ({kind})")
