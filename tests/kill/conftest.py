"""One sound bake to compare with, a nursery for those that are killed, and the table at the end."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from guardbake.bundle.files import describe
from guardbake.bundle.manifest import read_manifest, write_manifest
from guardbake.bundle.papers import seal

from tests.bakes import TINY, Baked

NURSERY = Path(__file__).parent / "nursery.py"
LANDED = pytest.StashKey[list[tuple[str, bool]]]()
FULL = pytest.StashKey[list[str]]()
Attend = Callable[..., dict[str, Any]]


def pytest_configure(config: pytest.Config) -> None:
    config.stash[LANDED], config.stash[FULL] = [], []


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    kills = metafunc.config.getoption("--kills")
    if "number" in metafunc.fixturenames:
        metafunc.parametrize("number", range(kills))
    if "disk" in metafunc.fixturenames:
        metafunc.parametrize("disk", range(-(-kills // 10)))


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    rows, full = config.stash[LANDED], config.stash[FULL]
    if not rows and not full:
        return
    say = terminalreporter.write_line
    terminalreporter.section("kills and full disks")
    dead = Counter(stage for stage, killed in rows if killed)
    for stage, number in sorted(dead.items()):
        say(f"{stage:<12} {number} kills")
    missed = sum(not killed for _, killed in rows)
    say(f"{sum(dead.values())} kills; {missed} bakes were done before theirs")
    for line in sorted(full):
        say(line)
    say(f"{len(full)} full disks survived")


@pytest.fixture(scope="session")
def landed(pytestconfig: pytest.Config) -> list[tuple[str, bool]]:
    return pytestconfig.stash[LANDED]


@pytest.fixture(scope="session")
def full(pytestconfig: pytest.Config) -> list[str]:
    return pytestconfig.stash[FULL]


@pytest.fixture(scope="session")
def attend() -> Iterator[Attend]:
    """`attend(recipe, out, stage="", delay=None, after=None)`: a bake, and how it went."""
    command = [sys.executable, str(NURSERY)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as nursery:
        assert nursery.stdin is not None
        assert nursery.stdout is not None

        def ask(
            recipe: Path,
            out: Path,
            stage: str = "",
            delay: float | None = None,
            after: int | None = None,
        ) -> dict[str, Any]:
            request = {"recipe": str(recipe), "out": str(out), "stage": stage}
            nursery.stdin.write(json.dumps(request | {"delay": delay, "after": after}) + "\n")
            nursery.stdin.flush()
            answer: dict[str, Any] = json.loads(nursery.stdout.readline())
            return answer

        yield ask
        nursery.stdin.close()


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe with everything that it names, nothing of which a bake may touch."""
    folder = tmp_path_factory.mktemp("sources")
    for name in ("tiny-llava", "tiny-prompts"):
        shutil.copytree(TINY.parent / name, folder / name)
    return Path(shutil.copy(TINY, folder / "recipe.toml"))


def state_of(folder: Path) -> dict[str, tuple[int, str]]:
    """Every file's time of change and digest."""
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    return {n: ((folder / n).stat().st_mtime_ns, describe(folder, n).sha256) for n in names}


@pytest.fixture(scope="session")
def untouched(sources: Path) -> Callable[[], bool]:
    before = state_of(sources.parent)
    return lambda: state_of(sources.parent) == before


@pytest.fixture(scope="session")
def older(baked: Baked, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound bundle of ours that differs from the one that is baked."""
    folder = Path(shutil.copytree(baked.bundle, tmp_path_factory.mktemp("older") / "bundle"))
    origins = read_manifest(folder).origins
    write_manifest(folder, seal(folder, replace(origins, tools={"guardbake": "0.0.1"})))
    return folder
