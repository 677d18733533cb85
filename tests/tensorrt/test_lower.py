"""The TensorRT copy computes what the certified graph computes, and owns no weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from guardbake_tensorrt.lower import LoweredGraph, lower_graph, read_graph


def _outputs(content: bytes, folder: Path, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    path = folder / "run.onnx"
    path.write_bytes(content)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    found: list[np.ndarray] = session.run(None, feeds)
    path.unlink()
    return found


def _without_marks(lowered: LoweredGraph) -> bytes:
    """onnxruntime refuses an attribute it does not know; the mark is TensorRT's alone."""
    for node in lowered.model.graph:
        node.attributes.pop("TRT_decomposable", None)
    return bytes(ir.to_proto(lowered.model).SerializeToString())


@pytest.mark.parametrize("gate", ["always", "token", "sequence", "each"])
def test_the_copy_computes_the_same(gate: Any, make_guarded: Any) -> None:
    guarded = make_guarded(gate, ("care", "astra"))
    rng = np.random.default_rng(2)
    feeds: dict[str, np.ndarray] = {
        "inputs_embeds": rng.standard_normal((3, 4, 16)).astype(np.float32),
        "attention_mask": np.array([[1] * 6, [0] * 2 + [1] * 4, [0, 0, 0, 1, 1, 1]], np.int64),
    }
    for layer in range(2):
        for name in ("key", "value"):
            past = rng.standard_normal((3, 2, 2, 8)).astype(np.float32)
            feeds[f"past_key_values.{layer}.{name}"] = past
    if gate in ("sequence", "each"):
        feeds["guard_state"] = np.array([0, -3, 2], np.int64)
    lowered = lower_graph(guarded.path, read_graph(guarded.path))
    folder = guarded.path.parent
    wanted = _outputs(guarded.path.read_bytes(), folder, feeds)
    found = _outputs(_without_marks(lowered), folder, feeds)
    assert len(wanted) == len(found)
    for one, other in zip(wanted, found, strict=True):
        assert one.tobytes() == other.tobytes()


def test_only_float32_attention_is_marked(guarded: Any) -> None:
    model = read_graph(guarded.path)
    lowered = lower_graph(guarded.path, model)
    names = [node.name for node in model.graph if node.op_type == "Attention"]
    assert list(lowered.decomposable) == names
    half = read_graph(guarded.path)
    for node in half.graph:
        if node.op_type == "Attention":
            node.inputs[0].dtype = ir.DataType.FLOAT16  # type: ignore[union-attr]
    assert lower_graph(guarded.path, half).decomposable == ()


def test_no_weight_is_copied(guarded: Any) -> None:
    lowered = lower_graph(guarded.path, read_graph(guarded.path))
    data = guarded.path.with_name("decoder.onnx.data").stat().st_size
    assert len(lowered.serialized) < guarded.path.stat().st_size + data // 4


def test_one_gate_is_sized_once(guarded: Any) -> None:
    lowered = lower_graph(guarded.path, read_graph(guarded.path))
    added = [n for n in lowered.model.graph if str(n.name).startswith("guardbake_tensorrt/")]
    assert [node.op_type for node in added] == ["Shape", "Reshape"]
    readers = [use.node.name for use in added[1].outputs[0].uses()]
    assert readers == [name for name in guarded.nodes if name.endswith("/edit")]
