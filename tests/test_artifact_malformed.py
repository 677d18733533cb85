"""What is no guard pack is refused, and said to be none."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from guardbake.artifact import MAX_HEADER, load_guard, save_guard
from guardbake.errors import IntegrityError, MalformedError
from guardbake.spec import GuardSpec, header_json

from tests.packs import Meta, malformed, rewrite

Build = Callable[..., GuardSpec]
KINDS = ("care", "care parallel", "care sequential", "project", "add", "steer", "astra")
PROFILES = ("always", "token", "sequence")


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
        ("sensors", [{}], "header"),
        ("sensors", None, "header"),
        ("sensors", [], "without a sensor"),
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


@pytest.mark.parametrize("key", sorted(["sensors", "edits", "model", "method", "profile"]))
def test_a_header_without_a_key_is_refused(pack: Path, key: str) -> None:
    rewrite(pack, lambda head, _a, _m: head.pop(key) and None)
    malformed(pack)


def test_a_boundary_nobody_knows_is_refused(pack: Path) -> None:
    rewrite(pack, lambda head, _a, _m: head["sensors"][0].update(sites=["layers.0.attention"]))
    malformed(pack, "attention")


def test_a_sensor_moved_to_another_layer_is_an_integrity_error(pack: Path) -> None:
    """Header and tensor names agree, the numbers are the pack's own: only the digest knows."""

    def move(head: dict[str, Any], arrays: dict[str, np.ndarray], _meta: Meta) -> None:
        head["sensors"][0]["sites"] = ["layers.1.residual"]
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
    "name", ["sensor.0.layers.0.residual.directions", "layers.2.ffn_output.visual.basis"]
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
        ({"gate": 1}, "gates"),
        ({"gate": False}, "gate False"),
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
