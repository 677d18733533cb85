"""Weights out of checkpoints: streamed to a file, or left where they lie."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from safetensors.torch import load_file, save_file

from guardbake.artifact import save_guard
from guardbake.batch import Batch
from guardbake.errors import IntegrityError, UsageError
from guardbake.spec import GuardSpec, ModelIdentity
from guardbake.steps.apply import apply_guard
from guardbake.steps.export import write_export
from guardbake.steps.records import file_digest
from guardbake.vlm.files import CheckpointFiles, hash_files
from guardbake.vlm.tensors import StoredTensor

from guardbake_onnx import OnnxExporter, weights
from guardbake_onnx.parameters import Parameter
from guardbake_onnx.runner import OnnxRunner
from guardbake_onnx.weights import IR_TYPES, StreamedTensor
from tests.onnx.conftest import Exported, largest_difference


@pytest.fixture(scope="module")
def linked(exported: Exported, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model with its weights left in a checkpoint on the same disk."""
    place = tmp_path_factory.mktemp("linked")
    checkpoint = Path(shutil.copytree(exported.vlm.folder, place / "checkpoint"))
    (place / "out").mkdir()
    OnnxExporter().export(hash_files(checkpoint), exported.captured, "zero-copy", place / "out")
    return place / "out"


def test_linked_weights_give_the_same_answers(
    exported: Exported, linked: Path, mixed_batch: Batch
) -> None:
    ours = OnnxRunner(linked).run(mixed_batch, 8)
    streamed = exported.runner.run(mixed_batch, 8)
    assert np.array_equal(ours.tokens, streamed.tokens)
    # the same products; a runtime may sum Gemm in another order than MatMul
    assert largest_difference(ours.step_logits, streamed.step_logits) < 1e-4
    valid = mixed_batch.attention_mask.astype(bool)
    assert largest_difference(ours.prefill_logits[valid], streamed.prefill_logits[valid]) < 1e-4


def test_linked_weights_are_the_checkpoint_and_said_to_be(linked: Path) -> None:
    source = linked.parent / "checkpoint" / "model.safetensors"
    assert (linked / source.name).samefile(source)
    assert not list(linked.glob("*.data"))
    (entry,) = json.loads((linked / "weights.json").read_text())["files"]
    assert entry == {
        "name": source.name,
        "sha256": file_digest(source),
        "size": source.stat().st_size,
    }
    for graph in (ir.load(path).graph for path in sorted(linked.glob("*.onnx"))):
        outside = [
            value.const_value
            for value in graph.initializers.values()
            if isinstance(value.const_value, ir.ExternalTensor)
        ]
        assert outside
        assert {str(tensor.location) for tensor in outside} == {source.name}
        assert all(node.op_type != "Transpose" or not _weight(node) for node in graph)


def _weight(node: ir.Node) -> bool:
    return node.inputs[0] is not None and node.inputs[0].is_initializer()


def test_a_guard_goes_into_a_graph_with_linked_weights(
    exported: Exported,
    linked: Path,
    guard: Callable[..., GuardSpec],
    mixed_batch: Batch,
    tmp_path: Path,
) -> None:
    text = exported.vlm.model.config.get_text_config()
    made = guard("always", width=text.hidden_size, layers=text.num_hidden_layers, edits=(2, 4))
    vlm = exported.vlm
    identity = ModelIdentity(
        vlm.family.name, text.num_hidden_layers, text.hidden_size, vlm.model_digest
    )
    spec = dataclasses.replace(made, model=identity)
    save_guard(spec, tmp_path / "guard.safetensors")
    runs = []
    for name, source in (("linked", linked), ("streamed", exported.folder)):
        # streamed weights are copied: a link would spoil the others' export
        how: Any = "link" if name == "linked" else "copy"
        apply_guard(source, tmp_path / "guard.safetensors", tmp_path / name, how)
        runs.append(OnnxRunner(tmp_path / name).run(mixed_batch, 8))
    assert np.array_equal(runs[0].tokens, runs[1].tokens)
    assert largest_difference(runs[0].step_logits, runs[1].step_logits) < 1e-4
    plain = exported.runner.run(mixed_batch, 8)
    assert largest_difference(runs[0].prefill_logits[:1], plain.prefill_logits[:1]) > 1e-2


@pytest.mark.parametrize("block", [7, 1 << 20])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("kept", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("wanted", [torch.float32, torch.float16, torch.bfloat16])
def test_a_streamed_tensor_is_the_stored_one_cast_and_turned(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    wanted: torch.dtype,
    kept: torch.dtype,
    transposed: bool,
    block: int,
) -> None:
    monkeypatch.setattr(weights, "_BLOCK", block)
    array = torch.randn(5, 9, generator=torch.Generator().manual_seed(3)).to(kept)
    save_file({"odd": torch.zeros(3, dtype=torch.uint8), "w": array}, tmp_path / "a.safetensors")
    raw = (tmp_path / "a.safetensors").read_bytes()
    data = array.view(torch.uint8).numpy().tobytes()
    kind = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}[kept]
    place = StoredTensor("w", tmp_path / "a.safetensors", kind, (5, 9), raw.index(data), len(data))
    shape = [9, 5] if transposed else [5, 9]
    value = ir.Value(name="w", shape=ir.Shape(shape), type=ir.TensorType(IR_TYPES[wanted]))
    streamed = StreamedTensor(place, Parameter("w", transposed), value)
    expected = (array.t() if transposed else array).to(wanted).contiguous()
    with (tmp_path / "out").open("wb") as file:
        streamed.tofile(file)
    assert (tmp_path / "out").read_bytes() == expected.view(torch.uint8).numpy().tobytes()
    assert streamed.tobytes() == expected.view(torch.uint8).numpy().tobytes()
    assert streamed.nbytes == len(streamed.tobytes())


def test_shards_and_their_order_change_no_byte(exported: Exported, tmp_path: Path) -> None:
    checkpoint = Path(shutil.copytree(exported.vlm.folder, tmp_path / "checkpoint"))
    whole = load_file(checkpoint / "model.safetensors")
    (checkpoint / "model.safetensors").unlink()
    index = {}
    for number, start in enumerate((0, len(whole) // 3)):
        name = f"model-{number}.safetensors"
        keys = sorted(whole, reverse=True)[start : None if start else len(whole) // 3]
        save_file({key: whole[key] for key in keys}, checkpoint / name)
        index |= dict.fromkeys(keys, name)
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    out = tmp_path / "out"
    out.mkdir()
    OnnxExporter().export(hash_files(checkpoint), exported.captured, "stream", out)
    for name in ("decoder.onnx.data", "vision.onnx.data", "decoder.onnx"):
        assert (out / name).read_bytes() == (exported.folder / name).read_bytes()


def test_a_checkpoint_that_changes_meanwhile_is_refused(exported: Exported, tmp_path: Path) -> None:
    checkpoint = Path(shutil.copytree(exported.vlm.folder, tmp_path / "checkpoint"))
    files = hash_files(checkpoint)
    (checkpoint / "model.safetensors").touch()
    (tmp_path / "out").mkdir()
    with pytest.raises(IntegrityError, match="changed while it was read"):
        write_export(files, exported.captured, "stream", tmp_path / "out")


def test_weights_on_another_disk_are_not_linked(
    exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def another_disk(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr("os.link", another_disk)
    files: CheckpointFiles = hash_files(exported.vlm.folder)
    with pytest.raises(UsageError, match="cannot share a file"):
        OnnxExporter().export(files, exported.captured, "zero-copy", tmp_path)
