"""kill -9 in the middle of a bake: nothing is lost, nothing half-published, and it goes on."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from guardbake.bundle.folders import remove
from guardbake.bundle.publish import OLD
from guardbake.bundle.verify import verify_bundle

from tests.bakes import Baked, differing
from tests.kill.plans import Plan, plan

Attend = Callable[..., dict[str, Any]]


def workspace_before(stage: str, baked: Baked, build: Path) -> set[str]:
    """Copy the stages that stand before `stage`; returns their folders' names."""
    names = list(baked.seconds)
    done = names[: names.index(stage)]
    for folder in (baked.bundle.parent / ".guardbake").iterdir():
        if folder.name.rpartition("-")[0] in done:
            shutil.copytree(folder, build / ".guardbake" / folder.name)
    return stages_in(build)


def stages_in(build: Path) -> set[str]:
    root = build / ".guardbake"
    names = [path.name for path in root.iterdir()] if root.is_dir() else []
    return {name for name in names if not name.startswith(".")}


def require_whole_or_old(out: Path, plan: Plan, baked: Baked, older: Path) -> None:
    """At the output: nothing, the older bundle or the new one, whole."""
    if out.is_dir():
        verify_bundle(out, full=True)
        assert not differing(out, baked.bundle) or (plan.over and not differing(out, older))
    elif plan.over:  # between the two renames of the swap: set aside, and whole
        (aside,) = out.parent.glob(f".*{OLD}")
        assert differing(aside, older) == []


def test_a_killed_bake_goes_on(
    number: int,
    baked: Baked,
    older: Path,
    attend: Attend,
    sources: Path,
    untouched: Callable[[], bool],
    landed: list[tuple[str, bool]],
    tmp_path: Path,
) -> None:
    this = plan(number, baked.seconds)
    out = tmp_path / "build" / "tiny"
    out.parent.mkdir()
    done = workspace_before(this.stage, baked, out.parent)
    if this.over:
        shutil.copytree(older, out)
    killed = attend(sources, out, this.stage, this.delay, this.after)
    assert killed["status"] in (-9, 0), this
    landed.append((this.stage, killed["status"] == -9))
    assert this.stage in killed["begun"]
    require_whole_or_old(out, this, baked, older)
    kept = stages_in(out.parent)
    assert kept >= done, this
    resumed = attend(sources, out)
    assert resumed["status"] == 0, this
    cached = {name for name, again in resumed["ended"].items() if again}
    assert {name.rpartition("-")[0] for name in kept} <= cached, this
    assert differing(out, baked.bundle) == [], this
    assert untouched()
    left = [path.name for path in out.parent.rglob(".*") if path.name != ".guardbake"]
    assert left == [], this
    remove(out.parent)


def test_what_is_compared_would_differ(baked: Baked, older: Path) -> None:
    papers = ["manifest.json", "provenance.json", "sbom.cdx.json"]  # each names the tools
    assert differing(baked.bundle, older) == papers
    assert differing(baked.bundle, baked.bundle.parent)


def test_plans_are_the_same_every_time_and_reach_every_stage(baked: Baked) -> None:
    plans = [plan(n, baked.seconds) for n in range(100)]
    assert plans == [plan(n, baked.seconds) for n in range(100)]
    assert {each.stage for each in plans} == set(baked.seconds)
