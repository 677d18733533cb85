"""One tiny recipe for all studies, its guard fitted once."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from guardbake.studies import StudyName
from guardbake.studies.run import STUDY, study
from guardbake.vlm.catalog import models_root

SECTION = """
[study]
limit = 16
layers = [1, 4, 5]
edits = ["steer"]
ranks = [2]
strengths = [0.5, 1.0]
pairs = [4, 10, 400]
draws = 4
lookalikes = ["file:odd.txt"]
"""
CANDIDATES = """[[fit.candidates]]
edit = "steer"
layers = [4]
strengths = [0.5]

[[fit.candidates]]
edit = "add"
layers = [5]
strengths = [1.0]

"""


class Watcher:
    """A reporter that keeps what it is told and may stop the run."""

    def __init__(self, stop: Callable[[str, int], bool] = lambda what, done: False) -> None:
        self.ended: list[tuple[str, bool]] = []
        self._stop = stop

    def begin(self, stage: str) -> None:
        """Ends are kept."""

    def advance(self, what: str, done: int, total: int) -> None:
        if self._stop(what, done):
            raise KeyboardInterrupt

    def end(self, stage: str, seconds: float, cached: bool) -> None:
        self.ended.append((stage, cached))


def write_recipe(folder: Path, section: str = SECTION) -> Path:
    """The tiny recipe with two candidates, few prompts, look-alikes and a section [study]."""
    for name in ("tiny-llava", "tiny-prompts"):
        (folder / name).symlink_to(models_root() / name)
    text = (models_root() / "tiny-llava.toml").read_text(encoding="utf-8")
    head, rest = text.split("[[fit.candidates]]", 1)
    for split, limit in (("fit", 24), ("validate", 24), ("test", 24)):
        source = f'harmless = ["file:tiny-prompts/harmless_{split}.txt"'
        odd = ', "file:odd.txt"' if split == "test" else ""
        head = head.replace(f"{source}]", f"{source}{odd}]\nlimit = {limit}", 1)
    (folder / "odd.txt").write_text("how do i cut a cake ?\nhow do i cut a rope ?\n")
    path = folder / "recipe.toml"
    path.write_text(head + CANDIDATES + rest[rest.index("[parity]") :] + section, encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def studied(tmp_path_factory: pytest.TempPathFactory) -> Callable[[StudyName], Path]:
    """`studied(name)` is the folder of that study of the tiny recipe, made when first asked for."""
    folder = tmp_path_factory.mktemp("studies")
    recipe = write_recipe(folder)

    def run(name: StudyName) -> Path:
        out = folder / name.value
        if not out.exists():
            study(name, recipe, out, Watcher())
        return out

    return run


@pytest.fixture(scope="session")
def figures(studied: Callable[[StudyName], Path]) -> Callable[[StudyName], dict[str, Any]]:
    """`figures(name)` are the study's figures."""

    def read(name: StudyName) -> dict[str, Any]:
        found = json.loads((studied(name) / STUDY).read_text())["figures"]
        assert isinstance(found, dict)
        return found

    return read
