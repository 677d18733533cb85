"""Stages of one piece of work: each done once for everything it depends on."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Protocol

from guardbake.bundle.canonical import JSON
from guardbake.bundle.stages import Workspace, run_stage
from guardbake.progress import Reporter
from guardbake.steps.records import code_digest, tool_versions

Advance = Callable[[str, int, int], None]
"""Told what is going on and how far it is: what, done, total."""


class Stages(Protocol):
    """Where cells are kept: `StagesBeside` is one."""

    def stage(self, name: str, key: Mapping[str, JSON], build: Callable[[Path], None]) -> Path: ...

    def versions(self, stage: str) -> dict[str, JSON]: ...


class StagesBeside:
    """Stages in the folder .guardbake beside what is being made, shown to a reporter."""

    def __init__(self, out: Path, reporter: Reporter) -> None:
        self.reporter = reporter
        self.workspace = Workspace(out.parent / ".guardbake")

    def stage(self, name: str, key: Mapping[str, JSON], build: Callable[[Path], None]) -> Path:
        """The stage's folder, built unless it was done."""
        self.reporter.begin(name)
        started = time.monotonic()
        folder, cached = run_stage(self.workspace.stage(name, key), build)
        self.reporter.end(name, time.monotonic() - started, cached)
        return folder

    def versions(self, stage: str) -> dict[str, JSON]:
        """What a stage's result may depend on besides its inputs: our code and the libraries."""
        code, tools = self._surroundings
        return {"code": code, "stage": stage, "versions": dict(tools)}

    @cached_property
    def _surroundings(self) -> tuple[str, dict[str, str]]:
        return code_digest(), tool_versions()
