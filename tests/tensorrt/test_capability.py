"""GPUs by name: the table, the names that are none, and the GPUs that need another backend."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest

from guardbake.errors import UnsupportedError, UsageError

from guardbake_tensorrt import Backend
from guardbake_tensorrt.backend import MessageLog
from guardbake_tensorrt.capability import NAMES, require_capabilities, resolve_capabilities


@pytest.mark.parametrize(
    ("names", "capabilities"),
    [
        (["sm89"], ("SM89",)),
        (["SM89", "SM120"], ("SM89", "SM120")),
        (["rtx-40", "rtx-50"], ("SM89", "SM120")),
        (["Ada", "Blackwell"], ("SM89", "SM120", "SM121")),
        (["rtx-50", "blackwell"], ("SM120", "SM121")),
        (["jetson-orin"], ("SM87",)),
        (["h100"], ("SM90",)),
        (["current"], ("CURRENT",)),
    ],
)
def test_a_gpu_is_found_by_the_name_people_use(
    names: list[str], capabilities: tuple[str, ...]
) -> None:
    assert resolve_capabilities(names) == capabilities


def test_an_unknown_name_is_answered_with_all_that_there_are() -> None:
    with pytest.raises(UsageError) as caught:
        resolve_capabilities(["rtx-40", "rtx-45"])
    assert "'rtx-45'" in caught.value.found
    for name in (*NAMES, "sm75", "sm121", "current"):
        assert re.search(rf"\b{name}\b", caught.value.expected), name


@pytest.mark.parametrize("names", [[], ["rtx-40", "RTX-40"], ["sm89", "SM89"], [""]])
def test_names_are_given_and_once_each(names: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        resolve_capabilities(names)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("name", "gpu"),
    [("jetson-orin", "Jetson Orin"), ("h100", "H100"), ("b200", "B200"), ("jetson-thor", "Thor")],
)
def test_a_gpu_without_rtx_says_which_backend_it_needs(
    name: str, gpu: str, backend: Backend
) -> None:
    with pytest.raises(UnsupportedError, match=gpu) as caught:
        require_capabilities(backend, resolve_capabilities([name]))
    assert caught.value.exit_code == 3
    assert "backend tensorrt" in caught.value.remedy


def test_every_rtx_name_is_one_the_library_compiles_for(backend: Backend) -> None:
    elsewhere = {"jetson-orin", "jetson-thor", "hopper", "h100", "h200", "b200", "b300"}
    for name in sorted(set(NAMES) - elsewhere):
        assert require_capabilities(backend, resolve_capabilities([name])), name


def test_the_gpu_at_hand_is_for_the_backend_that_needs_one(backend: Backend) -> None:
    with pytest.raises(UsageError, match="CURRENT"):
        require_capabilities(backend, resolve_capabilities(["current"]))
    library = Backend("tensorrt", SimpleNamespace(__name__="tensorrt"), "11", None, MessageLog())
    assert require_capabilities(library, resolve_capabilities(["current"])) == ()
    with pytest.raises(UnsupportedError, match="its own machine"):
        require_capabilities(library, resolve_capabilities(["jetson-orin"]))
