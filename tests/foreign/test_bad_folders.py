"""What a folder must not be: refused with the right exit code, and nothing written."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from guardbake.artifact import save_guard
from guardbake.errors import IntegrityError
from guardbake.passes.admit import MAX_IR, MAX_OPSET
from guardbake.spec import GuardSpec
from guardbake.steps.folder import unchanged

MERGED = "onnx/decoder_model_merged.onnx"


def edit_graph(path: Path, change: Callable[[ir.Model], None]) -> None:
    model = ir.load(path)
    change(model)
    path.write_bytes(ir.to_proto(model).SerializeToString())


def external(model: ir.Model, position: int = 0) -> tuple[ir.Value, ir.ExternalTensor]:
    held = [
        v for v in model.graph.initializers.values() if isinstance(v.const_value, ir.ExternalTensor)
    ]
    value = sorted(held, key=lambda v: v.const_value.offset or 0)[position]  # type: ignore[union-attr]
    assert isinstance(value.const_value, ir.ExternalTensor)
    return value, value.const_value


def moved(location: str | None = None, shift: int = 0, position: int = 0) -> Callable[[Path], None]:
    """Point a tensor elsewhere."""

    def change(model: ir.Model) -> None:
        value, old = external(model, position)
        value.const_value = ir.ExternalTensor(
            location or str(old.location),
            (old.offset or 0) + shift,
            old.length,
            old.dtype,
            shape=old.shape,
            name=str(old.name),
            base_dir=old.base_dir,
        )

    return lambda folder: edit_graph(folder / "model.onnx", change)


def linked(folder: Path) -> None:
    data = folder / "model.onnx.data"
    shutil.move(data, folder.parent / "elsewhere.data")
    data.symlink_to(folder.parent / "elsewhere.data")


def truncated(folder: Path) -> None:
    data = folder / "model.onnx.data"
    os.truncate(data, data.stat().st_size - 1)


def renamed_twice(model: ir.Model) -> None:
    one, other = list(model.graph)[:2]
    other.name = one.name


def newer(ir_version: int = 0, opset: int = 0) -> Callable[[Path], None]:
    def change(model: ir.Model) -> None:
        model.ir_version = ir_version or model.ir_version
        model.graph.opset_imports[""] = opset or model.graph.opset_imports[""]

    return lambda folder: edit_graph(folder / "model.onnx", change)


def second_candidate(model: ir.Model) -> None:
    """Two values of layer 1 that names take for the FFN's output."""
    for value, name in (("down_proj", "down_proj"), ("up_proj", "fc2")):
        node = next(n for n in model.graph if f"layers.1/mlp/{value}" in str(n.name))
        node.name = node.outputs[0].name = f"/lm/layers.1/mlp/{name}/MatMul"


def other_weights(folder: Path) -> None:
    """The branch without a cache gets a down_proj of its own."""

    def change(model: ir.Model) -> None:
        inner = next(iter(model.graph)).attributes["else_branch"].as_graph()
        node = next(n for n in inner if "layers.1/mlp/down_proj" in str(n.name))
        array = node.inputs[1].const_value.numpy() * np.float32(1.01)  # type: ignore[union-attr]
        value = ir.val("another", const_value=ir.tensor(array, name="another"))
        inner.register_initializer(value)
        node.replace_input_with(1, value)

    edit_graph(folder / MERGED, change)


def one_branch_without(folder: Path) -> None:
    """The branch without a cache computes its logits without a second FFN."""

    def change(model: ir.Model) -> None:
        inner = next(iter(model.graph)).attributes["else_branch"].as_graph()
        for node in inner:
            if "layers.1/mlp/down_proj" in str(node.name):
                node.name = node.outputs[0].name = "nameless"
            if node.op_type == "Softmax":
                node.op_type = "LogSoftmax"

    edit_graph(folder / MERGED, change)


def by_graph(change: Callable[[ir.Model], None]) -> Callable[[Path], None]:
    return lambda folder: edit_graph(folder / "model.onnx", change)


CASES: dict[str, tuple[str, Callable[[Path], None], int, str]] = {
    "data outside": ("genai-fp32", moved("../model.onnx.data"), 9, "beside the graph"),
    "data at a path": ("genai-fp32", moved("/etc/passwd"), 9, "beside the graph"),
    "no data": ("genai-fp32", moved("absent.data"), 9, "not there"),
    "data that is a link": ("genai-fp32", linked, 9, "symbolic link"),
    "short data": ("genai-fp32", truncated, 9, "bytes of its"),
    "data before the file": ("genai-fp32", moved(shift=-64), 9, "expected  an ONNX graph"),
    "data on other data": ("genai-fp32", moved(shift=-64, position=3), 9, "overlap"),
    "a name twice": ("mobius", by_graph(renamed_twice), 9, "name of two nodes"),
    "newer IR": ("optimum", newer(ir_version=MAX_IR + 1), 3, f"IR version {MAX_IR + 1}"),
    "newer opset": ("optimum", newer(opset=MAX_OPSET + 1), 3, f"opset version {MAX_OPSET + 1}"),
    "two candidates": ("genai-fp32", by_graph(second_candidate), 3, "2 matches by known name"),
    "branches of other weights": ("optimum-merged", other_weights, 3, "other weights"),
    "a branch that is another": ("optimum-merged", one_branch_without, 3, "no match"),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_folders_are_refused_and_nothing_is_written(
    run: Callable[..., int],
    graph_of: Callable[[str], Path],
    foreign_guard: Callable[..., GuardSpec],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    case: str,
) -> None:
    name, spoil, code, says = CASES[case]
    top = next(path for path in graph_of(name).parents if path.name == name)
    source = Path(shutil.copytree(top, tmp_path / name))
    spoil(source)
    save_guard(foreign_guard(), tmp_path / "guard")
    before = sorted(tmp_path.iterdir())
    arguments = ["--guard", tmp_path / "guard", "-o", tmp_path / "out"]
    assert run("apply", source, *arguments, "--no-self-check") == code
    assert says in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before


def disturb(data: Path, how: str) -> None:
    if how == "added":
        data.with_name("more").touch()
    elif how == "removed":
        data.unlink()
    elif how != "read":
        data.write_bytes(b"5678" if how == "written" else b"56789")


@pytest.mark.parametrize("how", ["read", "written", "grown", "added", "removed"])
def test_a_folder_that_changes_meanwhile(tmp_path: Path, how: str) -> None:
    data = tmp_path / "onnx" / "data"
    data.parent.mkdir()
    data.write_bytes(b"1234")
    os.utime(data, ns=(0, 0))

    def work() -> None:
        with unchanged(tmp_path):
            disturb(data, how)

    if how == "read":
        work()
        return
    with pytest.raises(IntegrityError, match="changed while it was being read"):
        work()


@pytest.mark.parametrize("source", ["empty", "absent"])
def test_a_folder_without_a_decoder(
    run: Callable[..., int],
    foreign_guard: Callable[..., GuardSpec],
    tmp_path: Path,
    source: str,
) -> None:
    (tmp_path / "empty").mkdir()
    save_guard(foreign_guard(), tmp_path / "guard")
    arguments = ["--guard", tmp_path / "guard", "-o", tmp_path / "out"]
    assert run("apply", tmp_path / source, *arguments, "--no-self-check") == 2
    assert not (tmp_path / "out").exists()
