"""Signing asks for its package and for sensible names; `make wheel` signs, harms and verifies."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from guardbake.bundle.signing import check_signature, sign
from guardbake.errors import EnvironmentFault

Run = Callable[..., int]


@pytest.fixture(autouse=True)
def without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the extra [sign] is not installed."""
    monkeypatch.setitem(sys.modules, "model_signing", None)


@pytest.mark.parametrize("act", [sign, check_signature])
def test_without_its_package_nothing_is_signed_or_believed(
    act: Callable[[Path, Path, Path], None], tmp_path: Path
) -> None:
    with pytest.raises(EnvironmentFault, match=r"guardbake\[sign\]") as caught:
        act(tmp_path / "bundle", tmp_path / "key.pem", tmp_path / "bundle.sig")
    assert caught.value.exit_code == 7
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_sound_bundle_is_not_signed(run: Run, tmp_path: Path) -> None:
    (tmp_path / "bundle").mkdir()
    command = ("sign", tmp_path / "bundle", "--key", tmp_path / "k", "-o", tmp_path / "s")
    assert run(*command) == 6
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("options", [("--signature", "s"), ("--public-key", "k")])
def test_a_signature_needs_its_key(
    run: Run, sources: dict[str, Path], options: tuple[str, str]
) -> None:
    assert run("verify", next(iter(sources.values())).parent, *options) == 2
