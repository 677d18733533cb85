"""A bake on a disk that is full before it is done, and again when there is room.

    python small_disk.py tmpfs|file-size FREE STAGES RECIPE BUILD

Copies the finished STAGES to BUILD, leaves FREE bytes there (tmpfs: mounted at BUILD by whoever
starts this, and made larger afterwards; file-size: no file may be larger), bakes, looks, makes
room, bakes again. Prints what was found as one JSON object; the bundle is BUILD/tiny.
"""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

Limit = Callable[[], None]


def resize(build: Path, size: int) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size}", str(build)], check=True)


def bake(recipe: Path, build: Path, limit: Limit | None) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-m", "guardbake", "bake", str(recipe), "-o", str(build / "tiny")],
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=limit,
    )
    return done.returncode, done.stderr[-2000:]


def used(folder: Path) -> int:
    """Bytes in whole pages, as tmpfs counts them, and a page for each folder."""
    sizes = [p.stat().st_size if p.is_file() else 4096 for p in [folder, *folder.rglob("*")]]
    return sum(-(-size // 4096) * 4096 for size in sizes)


def look(build: Path) -> dict[str, Any]:
    """What a bake that found no room has left."""
    stages = [p for p in (build / ".guardbake").iterdir() if not p.name.startswith(".")]
    return {
        "published": (build / "tiny").exists(),
        "hidden": sorted(p.name for p in build.rglob(".*") if p.name != ".guardbake"),
        "incomplete": sorted(p.name for p in stages if not (p / "stage.json").is_file()),
    }


def main(kind: str, free: int, stages: Path, recipe: Path, build: Path) -> dict[str, Any]:
    shutil.copytree(stages, build / ".guardbake")
    limit: Limit | None = None
    if kind == "tmpfs":
        resize(build, used(build) + free)
    else:
        limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (free, free))  # noqa: E731
    code, said = bake(recipe, build, limit)
    found = {"full": code, "said": said, **look(build)}
    if kind == "tmpfs":
        resize(build, 1 << 30)
    found["room"], found["said again"] = bake(recipe, build, None)
    return found


if __name__ == "__main__":
    kind, free, stages, recipe, build = sys.argv[1:]
    result = main(kind, int(free), Path(stages), Path(recipe), Path(build))
    if result["room"] == 0 and kind == "tmpfs":  # the mount goes with this process
        shutil.copytree(Path(build) / "tiny", Path(build).with_name("result"))
    sys.stdout.write(json.dumps(result) + "\n")
