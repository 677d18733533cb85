"""The sizes an engine serves, and the library behind the import guard."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest

from guardbake.errors import EnvironmentFault, UnsupportedError, UsageError

from guardbake_tensorrt import Backend, EngineProfile, load_backend
from guardbake_tensorrt.backend import MessageLog
from guardbake_tensorrt.capability import require_capabilities
from guardbake_tensorrt.profile import Phase

_PROFILE = EngineProfile(batch=(1, 2, 4), seq=(1, 8, 16), past=(0, 5, 32))


@pytest.mark.parametrize(
    ("name", "shape", "whole", "decode"),
    [
        ("inputs_embeds", (-1, -1, 7), ((1, 1, 7), (2, 8, 7), (4, 16, 7)), (4, 1, 7)),
        ("attention_mask", (-1, -1), ((1, 1), (2, 13), (4, 48)), (4, 33)),
        ("position_ids", (-1, -1), ((1, 1), (2, 8), (4, 16)), (4, 1)),
        ("position_ids", (3, -1, -1), ((3, 1, 1), (3, 2, 8), (3, 4, 16)), (3, 4, 1)),
        ("guard_state", (-1,), ((1,), (2,), (4,)), (4,)),
        (
            "past_key_values.3.value",
            (-1, 2, -1, 8),
            ((1, 2, 0, 8), (2, 2, 5, 8), (4, 2, 32, 8)),
            (4, 2, 32, 8),
        ),
    ],
)
def test_a_decoder_input_takes_its_sizes(name: str, shape: Any, whole: Any, decode: Any) -> None:
    assert _PROFILE.shapes("whole", name, shape) == whole
    assert _PROFILE.shapes("decode", name, shape)[2] == decode


def test_a_growing_cache_tells_where_a_prompt_begins() -> None:
    def tokens(phase: Phase) -> list[tuple[int, int, int]]:
        """(new tokens, those of the cache, those that the mask is about), by step."""
        embeds, cache, mask = (
            _PROFILE.shapes(phase, name, shape)
            for name, shape in (
                ("inputs_embeds", (-1, -1, 7)),
                ("past_key_values.0.key", (-1, 2, -1, 8)),
                ("attention_mask", (-1, -1)),
            )
        )
        return [(e[1], c[2], m[1]) for e, c, m in zip(embeds, cache, mask, strict=True)]

    assert tokens("whole") == [(1, 0, 1), (8, 5, 13), (16, 32, 48)]
    assert tokens("prefill") == [(1, 0, 1), (8, 0, 8), (16, 0, 16)]
    assert tokens("continued") == [(1, 1, 2), (8, 5, 13), (16, 32, 48)]
    assert tokens("decode") == [(1, 1, 2), (1, 5, 6), (1, 32, 33)]


def test_other_inputs_are_given_or_refused() -> None:
    shapes = ((1, 3, 8, 8), (1, 3, 8, 8), (2, 3, 8, 8))
    known = EngineProfile((1, 1, 1), (1, 1, 1), (0, 0, 0), inputs=(("pixel_values", *shapes),))
    assert known.phases == ("whole",)
    assert known.shapes("whole", "pixel_values", (-1, 3, 8, 8)) == shapes
    with pytest.raises(UnsupportedError, match="pixel_values"):
        _PROFILE.shapes("prefill", "pixel_values", (-1, 3, 8, 8))


def test_a_fixed_size_cannot_vary() -> None:
    with pytest.raises(UsageError, match="narrow the profile"):
        _PROFILE.shapes("prefill", "inputs_embeds", (1, -1, 7))


def test_a_static_cache_has_one_size() -> None:
    def shapes(name: str, shape: Any) -> Any:
        return _PROFILE.shapes("prefill", name, shape)

    assert shapes("attention_mask", (-1, 33)) == ((1, 33), (2, 33), (4, 33))
    assert shapes("write_indices", (-1,)) == ((1,), (2,), (4,))
    assert shapes("past_key_values.0.key", (-1, 2, 33, 8))[2] == (4, 2, 33, 8)
    with pytest.raises(UsageError, match="room for 32 tokens"):
        shapes("attention_mask", (-1, 32))
    with pytest.raises(UsageError, match="larger capacity"):
        shapes("past_key_values.0.key", (-1, 2, 32, 8))


@pytest.mark.parametrize("past", [(-1, 0, 1), (3, 2, 4), (0, 5, 4)])
def test_a_range_ascends(past: Any) -> None:
    with pytest.raises(UsageError, match="past range"):
        EngineProfile((1, 1, 1), (1, 1, 1), past)


def test_a_missing_library_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(EnvironmentFault, match="pip install tensorrt"):
        load_backend("tensorrt")
    with pytest.raises(UsageError):
        load_backend("openvino")


def test_a_library_without_capabilities_compiles_for_its_own_gpu() -> None:
    library = Backend("tensorrt", SimpleNamespace(__name__="tensorrt"), "11", None, MessageLog())
    assert require_capabilities(library, ["CURRENT"]) == ()
    with pytest.raises(UnsupportedError, match="its own machine"):
        require_capabilities(library, ["SM90"])
