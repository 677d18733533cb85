"""What a stage of several cells needs of the bake it belongs to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

from guardbake.bundle.canonical import JSON

Advance = Callable[[str, int, int], None]
"""Told what is going on and how far it is: what, done, total."""


class Stages(Protocol):
    """Where cells are kept, done once for everything they depend on: `pipeline.Bake` is one."""

    def stage(self, name: str, key: Mapping[str, JSON], build: Callable[[Path], None]) -> Path: ...

    def versions(self, stage: str) -> dict[str, JSON]: ...
