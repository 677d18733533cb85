"""Where a graph may say that its weights lie, and how much of anything a file may hold."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from safetensors.numpy import load_file

from guardbake.artifact import MAX_TENSORS, load_guard, safetensors_bytes, save_guard
from guardbake.bundle.canonical import parse
from guardbake.bundle.data import check_external_data
from guardbake.bundle.files import FileEntry
from guardbake.errors import IntegrityError, MalformedError, RecipeError
from guardbake.nesting import MAX_DEPTH
from guardbake.recipe import load_recipe
from guardbake.spec import GuardSpec, header_json


def graph(folder: Path, location: str, size: int = 16, shape: tuple[int, ...] = (4,)) -> ir.Model:
    """A graph with one tensor outside, whose file holds 16 bytes under the name "data"."""
    (folder / "data").write_bytes(bytes(16))
    tensor = ir.ExternalTensor(
        location, 0, size, ir.DataType.FLOAT, shape=ir.Shape(shape), name="w", base_dir=folder
    )
    weight = ir.val("w", const_value=tensor)
    held = ir.Graph([], [], nodes=[], initializers=[weight], opset_imports={"": 23})
    return ir.Model(held, ir_version=10)


def test_a_plain_file_beside_the_graph(tmp_path: Path) -> None:
    check_external_data(graph(tmp_path, "data"), tmp_path / "g.onnx")


def test_a_file_with_another_name_elsewhere(tmp_path: Path) -> None:
    """Whoever holds the other name can change the weights after they were verified."""
    model = graph(tmp_path, "data")
    (tmp_path / "away").mkdir()
    os.link(tmp_path / "data", tmp_path / "away" / "same")
    with pytest.raises(IntegrityError, match="2 hard links"):
        check_external_data(model, tmp_path / "g.onnx")


@pytest.mark.parametrize("location", ["é" * 200, "a" * 5000, "a\0b", "a/b", "..", "", "/data", "."])
def test_names_that_no_file_beside_it_has(tmp_path: Path, location: str) -> None:
    with pytest.raises(IntegrityError):
        check_external_data(graph(tmp_path, location), tmp_path / "g.onnx")


@pytest.mark.parametrize("dtype", [ir.DataType.STRING, ir.DataType.UNDEFINED])
def test_what_has_no_size_cannot_lie_outside(tmp_path: Path, dtype: ir.DataType) -> None:
    """Fuzzing found it."""
    model = graph(tmp_path, "data")
    text = ir.ExternalTensor("data", 0, 16, dtype, shape=ir.Shape((4,)), name="w")
    model.graph.initializers["w"].const_value = text
    with pytest.raises(MalformedError, match="outside the graph"):
        check_external_data(model, tmp_path / "g.onnx")


def test_links_and_folders_are_no_data(tmp_path: Path) -> None:
    model = graph(tmp_path, "other")
    (tmp_path / "other").symlink_to("data")
    with pytest.raises(IntegrityError, match="no plain file"):
        check_external_data(model, tmp_path / "g.onnx")
    (tmp_path / "other").unlink()
    (tmp_path / "other").mkdir()
    with pytest.raises(IntegrityError, match="no plain file"):
        check_external_data(model, tmp_path / "g.onnx")


def test_negative_sizes(tmp_path: Path) -> None:
    with pytest.raises(IntegrityError, match="sizes of 0 or more"):
        check_external_data(graph(tmp_path, "data", shape=(-4, 1)), tmp_path / "g.onnx")


# ---- how much of anything


@pytest.mark.parametrize("depth", [MAX_DEPTH, MAX_DEPTH + 1, 500, 100_000])
def test_json_is_as_deep_as_a_file_of_ours_at_most(depth: int) -> None:
    data = b"[" * depth + b"]" * depth
    if depth == MAX_DEPTH:
        parse(data, "x", "y")
        return
    with pytest.raises(MalformedError, match="deeply"):
        parse(data, "x", "y")


def test_a_header_nested_deeply_is_refused(guard: Callable[..., GuardSpec], tmp_path: Path) -> None:
    value: list[object] = []
    for _ in range(100):
        value = [value]
    save_guard(replace(guard(), provenance={"x": value}), tmp_path / "g")
    with pytest.raises(MalformedError, match="deeply"):
        load_guard(tmp_path / "g")


def test_a_pack_of_thousands_of_tensors_is_refused(
    guard: Callable[..., GuardSpec], tmp_path: Path
) -> None:
    spec = guard()
    save_guard(spec, tmp_path / "g")
    arrays = load_file(tmp_path / "g")
    arrays |= {f"x{number}": np.zeros(1, np.float32) for number in range(MAX_TENSORS)}
    meta = {"guardbake": header_json(spec), "digest": spec.digest}
    (tmp_path / "g").write_bytes(safetensors_bytes(arrays, meta))
    with pytest.raises(MalformedError, match="tensors"):
        load_guard(tmp_path / "g")


@pytest.mark.parametrize("method", ["\x1b[2J", "a\nb", "\ud800", "a" * 1000])
def test_a_name_that_a_terminal_would_obey_is_refused(
    guard: Callable[..., GuardSpec], method: str
) -> None:
    with pytest.raises(MalformedError, match="a name"):
        replace(guard(), method=method)
    with pytest.raises(MalformedError, match="can be shown"):
        replace(guard().model, family=method)


def test_a_path_of_thousands_of_parts_is_refused() -> None:
    with pytest.raises(MalformedError, match="too long"):
        FileEntry("a/" * 1000 + "b", 0, "0" * 64)


@pytest.mark.parametrize(
    "text", ["x = " + "[" * 50_000, "x = " + "1" * 5000, "#" * (1 << 21), "\udcff"]
)
def test_a_recipe_that_is_no_recipe(tmp_path: Path, text: str) -> None:
    (tmp_path / "r.toml").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(RecipeError):
        load_recipe(tmp_path / "r.toml")


def test_a_number_of_thousands_of_digits_in_a_header(
    guard: Callable[..., GuardSpec], tmp_path: Path
) -> None:
    spec = guard()
    head = json.loads(header_json(spec))
    text = json.dumps(head | {"provenance": 0}).replace(
        '"provenance": 0', '"provenance": ' + "9" * 5000
    )
    save_guard(spec, tmp_path / "g")
    meta = {"guardbake": text, "digest": spec.digest}
    (tmp_path / "g").write_bytes(safetensors_bytes(load_file(tmp_path / "g"), meta))
    with pytest.raises(MalformedError):
        load_guard(tmp_path / "g")
