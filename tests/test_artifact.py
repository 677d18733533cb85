"""The guard pack: what is written is what is read, and anything else is refused."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from guardbake.artifact import load_guard, require_model, save_guard
from guardbake.errors import IntegrityError, MalformedError
from guardbake.site import Site
from guardbake.spec import GuardSpec, header, tensors

from tests.packs import Meta, malformed, rewrite

Build = Callable[..., GuardSpec]
KINDS = ("care", "care parallel", "care sequential", "project", "add", "steer", "astra")
PROFILES = ("always", "token", "sequence")


# ---- round trip


@pytest.mark.parametrize("gains", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("profile", PROFILES)
def test_a_guard_comes_back_whole(
    guard: Build, tmp_path: Path, profile: str, kind: str, gains: bool
) -> None:
    spec = guard(profile, kind, edits=(1, 2), gains=gains)
    save_guard(spec, tmp_path / "g")
    back = load_guard(tmp_path / "g")
    assert back.digest == spec.digest
    assert header(back) == header(spec)
    for name, array in tensors(spec).items():
        assert tensors(back)[name].tobytes() == array.tobytes()
        assert not tensors(back)[name].flags.writeable


def test_a_guard_of_two_gates_comes_back_whole(guard: Build, tmp_path: Path) -> None:
    spec = guard("sequence", "add", later=(Site(1, "residual"),), edits=(1, 2), pools=True)
    save_guard(spec, tmp_path / "g")
    back = load_guard(tmp_path / "g")
    assert back.digest == spec.digest
    assert [edit.gate for edit in back.edits] == [0, 1]
    assert [sensor.pools for sensor in back.sensors] == [True, False]


def test_a_guard_that_replaces_comes_back_whole(guard: Build, tmp_path: Path) -> None:
    spec = guard("sequence", "replace", edits=(1, 2))
    save_guard(spec, tmp_path / "g")
    assert load_guard(tmp_path / "g").digest == spec.digest
    rewrite(tmp_path / "g", lambda head, _a, _m: head.update(profile="token"))
    malformed(tmp_path / "g", "profile sequence")


def test_the_same_guard_is_the_same_bytes(guard: Build, tmp_path: Path) -> None:
    """Often enough: a random order of two entries is the same 12 times in 2000 cases only."""
    for name in "ab" * 6:
        save_guard(guard("token", "care"), tmp_path / name)
        assert (tmp_path / name).read_bytes() == (tmp_path / "a").read_bytes()
    save_guard(load_guard(tmp_path / "a"), tmp_path / "c")
    assert len({(tmp_path / name).read_bytes() for name in ("a", "b", "c")}) == 1
    save_guard(guard("token", "care", seed=1), tmp_path / "d")
    assert (tmp_path / "d").read_bytes() != (tmp_path / "a").read_bytes()


def test_key_order_of_the_provenance_does_not_matter(guard: Build, tmp_path: Path) -> None:
    for name, order in (("a", ("x", "y")), ("b", ("y", "x"))):
        save_guard(replace(guard(), provenance={k: 1 for k in order}), tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


# ---- altered content


def test_an_altered_array_is_an_integrity_error(pack: Path) -> None:
    def flip(_head: dict[str, Any], arrays: dict[str, np.ndarray], _meta: Meta) -> None:
        centre = arrays["layers.2.ffn_output.text.centre"]
        centre.flat[3] = np.nextafter(centre.flat[3], np.float32(np.inf))

    rewrite(pack, flip)
    with pytest.raises(IntegrityError, match="altered"):
        load_guard(pack)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("sensors", 0, "thresholds"), [0.2]),
        (("sensors", 0, "thresholds"), [1e30]),
        (("edits", 0, "kind"), "care"),
        (("edits", 0, "fusion"), "parallel"),
        (("edits", 0, "branches", 0, "strength"), 0.9),
        (("profile",), "token"),
        (("method",), "other"),
        (("model", "digest"), "f" * 64),
        (("provenance", "n"), 4),
    ],
)
def test_an_altered_header_is_an_integrity_error(
    pack: Path, path: tuple[Any, ...], value: Any
) -> None:
    same = []

    def alter(head: dict[str, Any], _arrays: dict[str, np.ndarray], _meta: Meta) -> None:
        *way, last = path
        place: Any = head
        for step in way:
            place = place[step]
        same.append(isinstance(place, dict) and place.get(last) == value)
        place[last] = value

    rewrite(pack, alter)
    if same == [True]:
        load_guard(pack)  # the harness itself alters nothing
    else:
        with pytest.raises(IntegrityError):
            load_guard(pack)


def test_a_swapped_digest_is_an_integrity_error(pack: Path) -> None:
    rewrite(pack, lambda _h, _a, meta: meta.update(digest="0" * 64))
    with pytest.raises(IntegrityError):
        load_guard(pack)


@pytest.mark.parametrize(
    "name", ["layers.2.ffn_output.text.gains", "layers.2.ffn_output.reference"]
)
def test_arrays_that_were_added_or_taken_away_are_refused(
    guard: Build, tmp_path: Path, name: str
) -> None:
    """Gains that are gone are never taken for ones, nor a reference for the origin."""
    kind, error = ("care", IntegrityError) if "gains" in name else ("astra", MalformedError)
    spec = guard("token", kind, gains=True)
    for path in (tmp_path / "less", tmp_path / "other"):
        save_guard(spec, path)
    rewrite(tmp_path / "less", lambda _h, arrays, _m: arrays.pop(name) is None)
    with pytest.raises(error):
        load_guard(tmp_path / "less")
    rewrite(tmp_path / "other", lambda _h, arrays, _m: arrays.update({name: arrays[name] * 2}))
    with pytest.raises(IntegrityError):
        load_guard(tmp_path / "other")


def test_an_edit_moved_to_another_layer_is_refused(pack: Path) -> None:
    def move(head: dict[str, Any], arrays: dict[str, np.ndarray], _meta: Meta) -> None:
        head["edits"][0]["site"] = "layers.1.ffn_output"
        for name in [n for n in arrays if n.startswith("layers.2.")]:
            arrays[name.replace("layers.2.", "layers.1.")] = arrays.pop(name)

    rewrite(pack, move)
    with pytest.raises(IntegrityError):
        load_guard(pack)


# ---- writing


def test_a_failed_write_leaves_the_old_pack_and_nothing_else(
    guard: Build, pack: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = pack.read_bytes()

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    for target, name in ((os, "replace"), (Path, "write_bytes")):
        with monkeypatch.context() as patch:
            patch.setattr(target, name, fail)
            with pytest.raises(OSError, match="No space"):
                save_guard(guard("token", "add"), pack)
        assert pack.read_bytes() == before
        assert list(pack.parent.iterdir()) == [pack]


def test_writing_over_a_pack_replaces_it(guard: Build, pack: Path) -> None:
    other = guard("token", "add")
    save_guard(other, pack)
    assert load_guard(pack).digest == other.digest
    assert list(pack.parent.iterdir()) == [pack]


# ---- the model it belongs to


def test_a_guard_for_another_model_is_refused(guard: Build) -> None:
    require_model(guard(), "0" * 64, "x")
    with pytest.raises(IntegrityError, match="fitted"):
        require_model(guard(), "0" * 63 + "1", "x")
