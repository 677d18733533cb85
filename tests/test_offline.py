"""The bake that the tests share runs where no socket can be made: the block itself, tried."""

from __future__ import annotations

import runpy
import subprocess
import sys

import pytest

from tests.bakes import OFFLINE

ATTEMPTS = (
    "import socket; socket.socket()",
    "import socket; socket.getaddrinfo('localhost', 80)",
    "import urllib.request; urllib.request.urlopen('http://localhost:9')",
)


@pytest.mark.parametrize("attempt", ATTEMPTS)
def test_an_attempt_would_have_failed(attempt: str) -> None:
    script = (
        f"import runpy, sys; sys.addaudithook(runpy.run_path(sys.argv[1])['refuse']); {attempt}"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, OFFLINE], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "a bake reaches no network" in done.stderr


def test_other_events_pass() -> None:
    assert runpy.run_path(str(OFFLINE))["refuse"]("open", ("a",)) is None
