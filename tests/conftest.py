"""What the whole suite shares: a quiet, repeatable hypothesis, small guards, the command line."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import pytest
from hypothesis import settings

from guardbake.artifact import save_guard
from guardbake.cli import main
from guardbake.semantics import Fusion
from guardbake.site import Site
from guardbake.spec import (
    Branch,
    Edit,
    EditKind,
    GuardSpec,
    Modality,
    ModelIdentity,
    Profile,
    Reading,
    Sensor,
)

from tests.bakes import TINY, Baked, guardbake

settings.register_profile("house", derandomize=True, deadline=None, max_examples=40, database=None)
settings.load_profile("house")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--kills", type=int, default=3, help="bakes to kill, see tests/kill")
    parser.addoption("--cases", type=int, default=2100, help="damaged files, see tests/fuzz")


FIRST_RESIDUAL = Site(0, "residual")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The demo's bake first: it takes longest, and in several processes the rest run beside it."""
    items.sort(key=lambda item: item.path.name != "test_demo.py")


def small_guard(
    profile: Profile = "sequence",
    kind: str = "care",
    *,
    width: int = 16,
    layers: int = 3,
    sensor: Site | tuple[Site, ...] = FIRST_RESIDUAL,
    later: tuple[Site, ...] = (),
    pools: bool = False,
    edits: tuple[int, ...] = (2,),
    strength: float = 1.0,
    threshold: float = 0.1,
    family: str = "llava",
    seed: int = 0,
    gains: bool = False,
) -> GuardSpec:
    """A guard of random numbers, complete and valid, the same for the same arguments.

    sensor: where it reads, once or several times; pools: whether it averages over image tokens.
    later: a further sensor at each of these sites. Sensors open an edit each, the last all others.
    kind: an edit's kind, for care with a fusion behind it: "care sequential".
    """
    rng = np.random.default_rng(seed)

    def vector() -> np.ndarray:
        return rng.standard_normal(width).astype(np.float32)

    def unit() -> np.ndarray:
        direction = vector()
        return direction / np.linalg.norm(direction)

    def branch(modality: Modality, rank: int) -> Branch:
        basis = np.linalg.qr(rng.standard_normal((width, rank)))[0].astype(np.float32)
        uneven = rng.uniform(0.2, 1.8, rank).astype(np.float32) if gains else None
        return Branch(modality, basis, vector(), strength, uneven)

    def edit(index: int, layer: int) -> Edit:
        return replace(ungated(Site(layer, "ffn_output")), gate=min(index, len(later)))

    def ungated(site: Site) -> Edit:
        name, _, fusion = kind.partition(" ")
        if name == "steer":
            return Edit(site, "steer", (), vector(), strength)
        if name == "astra":
            push = unit()  # seen from behind it most vectors point along the push
            return Edit(site, "astra", (), push, strength, reference=0.03 * vector() - push)
        if name == "care":
            both = branch("visual", 3), branch("text", 2)
            return Edit(site, "care", both, fusion=cast(Fusion, fusion or "adaptive"))
        return Edit(site, cast(EditKind, name), (branch("text", 3),))

    def reading(site: Site, columns: int) -> Reading:
        return Reading(site, np.stack([unit() for _ in range(columns)], axis=1), vector())

    sites = sensor if isinstance(sensor, tuple) else (sensor,)
    limits = (threshold, threshold + 0.2, threshold + 0.1) if pools else (threshold,)
    sensors = [Sensor(tuple(reading(site, 1 + pools) for site in sites), limits)]
    sensors += [Sensor((reading(site, 1),), (threshold,)) for site in later]
    changes = tuple(edit(index, layer) for index, layer in enumerate(edits))
    identity = ModelIdentity(family, layers, width, "0" * 64)
    gated = tuple(sensors) if profile != "always" else ()
    return GuardSpec(identity, "test", profile, gated, changes, {"n": 3})


@pytest.fixture(scope="session")
def guard() -> Callable[..., GuardSpec]:
    """`small_guard`, for tests that build guards."""
    return small_guard


@pytest.fixture
def pack(tmp_path: Path) -> Path:
    """A guard pack on disk."""
    path = tmp_path / "guard.safetensors"
    save_guard(small_guard("sequence", "care"), path)
    return path


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """`run("verify", folder)` is the exit code of `guardbake verify folder`."""

    def command(*arguments: object) -> int:
        monkeypatch.setattr(sys, "argv", ["guardbake", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
        return int(stopped.value.code or 0)

    return command


@pytest.fixture(scope="session")
def baked(tmp_path_factory: pytest.TempPathFactory) -> Baked:
    """The toy LLaVA, baked by the command line once for all tests that look at a bundle."""
    build = tmp_path_factory.mktemp("build")
    done = guardbake("bake", TINY, "-o", build / "tiny", "--progress", "json")
    assert done.returncode == 0, done.stderr[-3000:]
    (export,) = (build / ".guardbake").glob("export-*")
    return Baked(build / "tiny", export / "onnx", done.stdout, done.stderr)
