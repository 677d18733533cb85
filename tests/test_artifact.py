"""The guard pack: what is written is what is read, and anything else is refused."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load, save

from guardbake.artifact import MAX_HEADER, load_guard, require_model, save_guard
from guardbake.errors import IntegrityError, MalformedError
from guardbake.spec import GuardSpec, header, header_json, tensors

Build = Callable[..., GuardSpec]
Meta = dict[str, str]
KINDS = ("care", "care parallel", "care sequential", "project", "add", "steer", "astra")
PROFILES = ("always", "token", "sequence")


@pytest.fixture
def pack(guard: Build, tmp_path: Path) -> Path:
    path = tmp_path / "guard.safetensors"
    save_guard(guard("sequence", "care"), path)
    return path


def rewrite(
    path: Path,
    change: Callable[[dict[str, Any], dict[str, np.ndarray], Meta], None],
    own_digest: bool = True,
) -> None:
    """Change header, arrays or metadata; the digest in the metadata stays unless changed there."""
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    meta = json.loads(data[8 : 8 + length])["__metadata__"]
    head, arrays = json.loads(meta["guardbake"]), load(data)
    before = json.dumps(head)
    change(head, arrays, meta)
    if json.dumps(head) != before:
        meta["guardbake"] = json.dumps(head, sort_keys=True, separators=(",", ":"))
    path.write_bytes(save(arrays, meta))


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
        (("sensor", "thresholds"), [0.2]),
        (("sensor", "thresholds"), [1e30]),
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


# ---- not a guard pack


def malformed(path: Path, says: str | None = None) -> None:
    with pytest.raises(MalformedError, match=says) as caught:
        load_guard(path)
    assert caught.value.exit_code == 9


def test_every_cut_of_the_file_is_refused(pack: Path) -> None:
    data = pack.read_bytes()
    for size in {0, 1, 7, 8, 9, 100, len(data) // 2, len(data) - 1}:
        pack.write_bytes(data[:size])
        malformed(pack)


def test_bytes_after_the_end_are_refused(pack: Path) -> None:
    pack.write_bytes(pack.read_bytes() + b"\0")
    malformed(pack)


@given(st.binary(max_size=300))
@settings(max_examples=60)
def test_garbage_is_refused(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.mktemp("garbage") / "g"
    path.write_bytes(data)
    malformed(path)


@given(st.integers(0, 10_000), st.integers(0, 255))
@settings(max_examples=150)
def test_no_changed_byte_passes(
    guard: Build, tmp_path_factory: pytest.TempPathFactory, place: int, value: int
) -> None:
    """Any one byte of a pack changed: an error of ours, or the file was not changed in meaning."""
    spec = guard("token", "steer")
    path = tmp_path_factory.mktemp("bytes") / "g"
    save_guard(spec, path)
    data = bytearray(path.read_bytes())
    data[place % len(data)] = value
    path.write_bytes(bytes(data))
    with suppress(IntegrityError, MalformedError):
        assert load_guard(path).digest == spec.digest


def test_a_huge_header_length_is_refused_before_it_is_read(pack: Path) -> None:
    data = pack.read_bytes()
    pack.write_bytes(struct.pack("<Q", MAX_HEADER + 1) + data[8:])
    malformed(pack, "1 MiB")
    pack.write_bytes(struct.pack("<Q", 2**63 + 5) + data[8:])
    malformed(pack, "1 MiB")


def test_no_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    malformed(tmp_path / "absent", "unreadable")
    malformed(tmp_path, "unreadable")


@pytest.mark.parametrize("key", ["guardbake", "digest"])
def test_missing_metadata_is_refused(pack: Path, key: str) -> None:
    rewrite(pack, lambda _h, _a, meta: meta.pop(key) and None)
    malformed(pack, "without guardbake metadata")


def test_a_plain_safetensors_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "g").write_bytes(save({"x": np.zeros(3, np.float32)}))
    malformed(tmp_path / "g", "without guardbake metadata")


@pytest.mark.parametrize("text", ["{", "[]", "7", "[" * 100_000, "9" * 5_000, "null", '"x"'])
def test_a_header_that_is_no_object_is_refused(pack: Path, text: str) -> None:
    rewrite(pack, lambda _h, _a, meta: meta.update(guardbake=text))
    malformed(pack)


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("version", 1, "version"),
        ("version", None, "version"),
        ("polarity", "harmless-positive", "polarity"),
        ("polarity", None, "polarity"),
        ("profile", "batch", "profile"),
        ("edits", [], "no edits"),
        ("edits", 7, "header"),
        ("edits", [{}], "header"),
        ("sensor", {}, "header"),
        ("sensor", None, "without a sensor"),
        ("model", {}, "header"),
        ("model", {"family": "x", "layers": "3", "width": 16, "digest": ""}, "layers"),
        ("model", {"family": "x", "layers": 1e999, "width": 16, "digest": ""}, "layers"),
        ("method", 7, "method"),
        ("provenance", None, "provenance"),
    ],
)
def test_a_wrong_header_is_refused(pack: Path, key: str, value: Any, says: str) -> None:
    rewrite(pack, lambda head, _a, _m: head.update({key: value}))
    malformed(pack, says)


@pytest.mark.parametrize("key", sorted(["sensor", "edits", "model", "method", "profile"]))
def test_a_header_without_a_key_is_refused(pack: Path, key: str) -> None:
    rewrite(pack, lambda head, _a, _m: head.pop(key) and None)
    malformed(pack)


def test_a_boundary_nobody_knows_is_refused(pack: Path) -> None:
    rewrite(pack, lambda head, _a, _m: head["sensor"].update(sites=["layers.0.attention"]))
    malformed(pack, "attention")


def test_a_sensor_moved_to_another_layer_is_an_integrity_error(pack: Path) -> None:
    """Header and tensor names agree, the numbers are the pack's own: only the digest knows."""

    def move(head: dict[str, Any], arrays: dict[str, np.ndarray], _meta: Meta) -> None:
        head["sensor"]["sites"] = ["layers.1.residual"]
        for name in [n for n in arrays if n.startswith("sensor.")]:
            arrays[name.replace("layers.0", "layers.1")] = arrays.pop(name)

    rewrite(pack, move)
    with pytest.raises(IntegrityError, match="altered"):
        load_guard(pack)


def test_an_edited_boundary_must_be_the_ffn_output(pack: Path) -> None:
    def move(head: dict[str, Any], arrays: dict[str, np.ndarray], _meta: Meta) -> None:
        head["edits"][0]["site"] = "layers.2.residual"
        for name in [n for n in arrays if n.startswith("layers.2.")]:
            arrays[name.replace("ffn_output", "residual")] = arrays.pop(name)

    rewrite(pack, move)
    malformed(pack, "boundary")


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize(
    "name", ["sensor.layers.0.residual.directions", "layers.2.ffn_output.visual.basis"]
)
def test_a_number_that_is_not_finite_is_refused(pack: Path, name: str, value: float) -> None:
    rewrite(pack, lambda _h, arrays, _m: arrays[name].__setitem__((0,) * arrays[name].ndim, value))
    malformed(pack, "not finite")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"fusion": "sum"}, "fusion"),
        ({"fusion": None}, "fusion"),
        ({"fusion": ["parallel"]}, "fusion"),
        ({"fusion": "adaptive"}, "nobody reads"),  # the one spelling of it is to leave it out
        ({"gains": [1.0]}, "nobody reads"),
        ({"kind": "project"}, "2 branches"),
        ({"kind": "astra", "branches": []}, "no push"),
    ],
)
def test_a_wrong_edit_is_refused(pack: Path, change: dict[str, Any], says: str) -> None:
    rewrite(pack, lambda head, _a, _m: head["edits"][0].update(change))
    malformed(pack, says)


@pytest.mark.parametrize(
    ("name", "array", "says"),
    [
        ("visual.gains", np.ones(2, np.float32), "shape"),
        ("visual.gains", np.full(3, np.nan, np.float32), "not finite"),
        ("reference", np.ones(16, np.float32), "a reference"),
        ("push", np.ones(16, np.float32), "a push"),
    ],
)
def test_an_array_that_does_not_fit_the_edit_is_refused(
    pack: Path, name: str, array: np.ndarray, says: str
) -> None:
    full = f"layers.2.ffn_output.{name}"
    rewrite(pack, lambda _h, arrays, _m: arrays.update({full: array}))
    malformed(pack, says)


def test_a_missing_array_is_refused(pack: Path) -> None:
    rewrite(pack, lambda _h, arrays, _m: arrays.pop("layers.2.ffn_output.text.basis") is None)
    malformed(pack, r"text\.basis")


def test_an_array_nobody_reads_is_refused(pack: Path) -> None:
    rewrite(pack, lambda _h, arrays, _m: arrays.update(extra=np.zeros(1, np.float32)))
    malformed(pack, "extra")


@pytest.mark.parametrize("dtype", ["F64", "F16", "BF16", "I32", "F8_E4M3", "F4"])
def test_arrays_of_another_dtype_are_refused(tmp_path: Path, dtype: str, guard: Build) -> None:
    """Some of these numpy cannot even name: written by hand."""
    bits = {"F64": 64, "F16": 16, "BF16": 16, "I32": 32, "F8_E4M3": 8, "F4": 4}[dtype]
    spec = guard("always", "steer")
    size = 16 * bits // 8
    head = {
        "__metadata__": {"guardbake": header_json(spec), "digest": spec.digest},
        "layers.2.ffn_output.push": {"dtype": dtype, "shape": [16], "data_offsets": [0, size]},
    }
    raw = json.dumps(head).encode()
    (tmp_path / "g").write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(size))
    malformed(tmp_path / "g", "float32")


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
