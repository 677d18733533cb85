"""Where Python does not search for garbage, and that it does again."""

from __future__ import annotations

import gc

import pytest

from guardbake.collector import no_collection


def test_it_searches_again_even_after_an_error() -> None:
    def work() -> None:
        with no_collection(), no_collection():
            assert not gc.isenabled()
            raise ValueError("x")

    with pytest.raises(ValueError, match="x"):
        work()
    assert gc.isenabled()


def test_who_had_turned_it_off_finds_it_off() -> None:
    gc.disable()
    try:
        with no_collection():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
