"""Every benchmark in miniature, for the tests of this folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.samples.miniatures import MAKERS


@pytest.fixture
def benchmarks(tmp_path: Path) -> Path:
    """A folder with a miniature of every benchmark, each in a folder of its name."""
    for name, make in MAKERS.items():
        make(tmp_path / name)
    return tmp_path
