"""One tiny recipe for all studies, its guard fitted once."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from guardbake.studies import StudyName
from guardbake.studies.run import STUDY, study

from tests.tiny_runs import Watcher, tiny_recipe

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


@pytest.fixture(scope="session")
def studied(tmp_path_factory: pytest.TempPathFactory) -> Callable[[StudyName], Path]:
    """`studied(name)` is the folder of that study of the tiny recipe, made when first asked for."""
    folder = tmp_path_factory.mktemp("studies")
    recipe = tiny_recipe(folder, CANDIDATES, SECTION, 24)

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
