"""Where onnxruntime computes, and that no other provider steps in unseen."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper

from guardbake.batch import Batch
from guardbake.errors import EnvironmentFault, UnsupportedError, UsageError
from guardbake.plugins import Trace, find_runner, find_session

from guardbake_onnx.loop import ExecutorRunner
from guardbake_onnx.provider import CPU, CUDA, open_session, require_placed
from guardbake_onnx.runner import CudaRunner, OnnxRunner, OrtExecutor
from tests.onnx.conftest import Exported

STEPS = 6


@dataclass(frozen=True)
class Held:
    """An array on the host that passes for a resident one."""

    value: Any

    def numpy(self) -> Any:
        return self.value


class PlainExecutor(OrtExecutor):
    """Everything through host memory, by `session.run`; the cache goes there and back."""

    def run(
        self, feeds: Mapping[str, Any], carried: Mapping[str, Any], keep: Set[str]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        given = {**feeds, **{name: left.numpy() for name, left in carried.items()}}
        found = dict(zip(self.outputs, self._session.run(None, given), strict=True))
        host = {name: value for name, value in found.items() if name not in keep}
        return host, {name: Held(found[name]) for name in self.outputs if name in keep}


def _plain(folder: Path) -> Callable[[str], PlainExecutor]:
    return lambda name: PlainExecutor(open_session(folder / f"{name}.onnx", 0), CPU)


def _require_equal(one: Trace, other: Trace) -> None:
    for name in ("tokens", "prefill_logits", "step_logits", "lengths", "valid"):
        assert np.array_equal(getattr(one, name), getattr(other, name)), name
    assert one.taps.keys() == other.taps.keys()


def test_bound_inputs_and_outputs_change_no_bit(exported: Exported, mixed_batch: Batch) -> None:
    plain = ExecutorRunner(exported.runner.description, _plain(exported.folder))
    assert plain.number == exported.runner.number == "float32"
    for chunk in (None, 4):
        wanted = plain.run(mixed_batch, STEPS, chunk=chunk)
        _require_equal(exported.runner.run(mixed_batch, STEPS, chunk=chunk), wanted)


def test_a_decoder_of_few_rows_takes_a_batch_in_groups(
    exported: Exported, mixed_batch: Batch
) -> None:
    """3 rows, 2 at most: row by row what the whole batch gives, in its order and its widths."""
    whole = exported.runner.run(mixed_batch, STEPS)

    def few(name: str) -> OrtExecutor:
        executor = OrtExecutor(open_session(exported.folder / f"{name}.onnx", 0), CPU)
        executor.rows = 2
        return executor

    grouped = ExecutorRunner(exported.runner.description, few).run(mixed_batch, STEPS)
    assert np.array_equal(grouped.tokens, whole.tokens)
    assert grouped.prefill_logits.shape == whole.prefill_logits.shape
    # another batch size, another blocking of the products: float32 noise, as in test_runner
    assert np.abs(grouped.step_logits - whole.step_logits).max() <= 1e-4


def test_the_cache_stays_where_it_is_computed(exported: Exported, mixed_batch: Batch) -> None:
    kept: list[Set[str]] = []

    class Watched(OrtExecutor):
        def run(self, feeds: Any, carried: Any, keep: Set[str]) -> Any:
            assert not [name for name in feeds if carried and name.startswith("past_key_values.")]
            host, left = super().run(feeds, carried, keep)
            assert all(isinstance(value, onnxruntime.OrtValue) for value in left.values())
            kept.append(left.keys())
            return host, left

    def watched(name: str) -> OrtExecutor:
        return Watched(open_session(exported.folder / f"{name}.onnx", 0), CPU)

    ExecutorRunner(exported.runner.description, watched).run(mixed_batch, STEPS)
    layers = exported.runner.description.layers
    assert sum(len(names) == 2 * layers for names in kept) >= 2


def _half(kind: int) -> bytes:
    x = helper.make_tensor_value_info("x", kind, ["n", 2])
    y = helper.make_tensor_value_info("y", kind, ["n", 2])
    node = helper.make_node("Identity", ["x"], ["y"])
    graph = helper.make_graph([node], "half", [x], [y])
    opset = [helper.make_opsetid("", 23)]
    return helper.make_model(graph, opset_imports=opset, ir_version=11).SerializeToString()


def _executor(tmp_path: Path, kind: int) -> OrtExecutor:
    path = tmp_path / "half.onnx"
    path.write_bytes(_half(kind))
    return OrtExecutor(open_session(path, 1), CPU)


def test_bfloat16_goes_in_and_out_as_its_bits(tmp_path: Path) -> None:
    executor = _executor(tmp_path, TensorProto.BFLOAT16)
    value = np.array([[1, -2.5], [3.140625, 0]]).astype(ml_dtypes.bfloat16)
    assert executor.inputs["x"].dtype == value.dtype
    found, _ = executor.run({"x": value}, {}, frozenset())
    assert found["y"].dtype == value.dtype
    assert np.array_equal(found["y"], value)
    _, left = executor.run({"x": value}, {}, {"y"})
    again, _ = executor.run({}, {"x": left["y"]}, frozenset())
    assert np.array_equal(again["y"], value)


def test_a_graph_of_other_types_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="double"):
        _executor(tmp_path, TensorProto.DOUBLE)


def test_cuda_is_asked_for_without_tf32_and_said_so() -> None:
    assert dict(CUDA.options) == {"use_tf32": "0"}
    assert str(CUDA).endswith("CUDAExecutionProvider, use_tf32 0")


def test_no_cuda_is_a_fault_of_the_environment(exported: Exported, mixed_batch: Batch) -> None:
    assert CUDA.name not in onnxruntime.get_available_providers()
    with pytest.raises(EnvironmentFault, match="onnxruntime-gpu") as caught:
        CudaRunner(exported.folder).run(mixed_batch, 1)
    assert caught.value.exit_code == 7
    with pytest.raises(EnvironmentFault, match="CUDAExecutionProvider"):
        find_session("cuda")(_half(TensorProto.FLOAT), exported.folder)
    with pytest.raises(UsageError, match="engines"):
        find_runner("cuda")(exported.folder, exported.folder)


def test_products_that_the_cpu_computes_unasked_are_a_fault(exported: Exported) -> None:
    """A session of the CPU alone, held to be CUDA's: by its providers, then by its nodes."""
    path = exported.folder / "decoder.onnx"
    session = open_session(path, 0)
    require_placed(session, CPU, path)
    with pytest.raises(EnvironmentFault, match="a session of CPUExecutionProvider"):
        require_placed(session, CUDA, path)

    class Pretending:
        def get_providers(self) -> list[str]:
            return [CUDA.name, CPU.name]

        def get_provider_graph_assignment_info(self) -> Any:
            return session.get_provider_graph_assignment_info()

    with pytest.raises(EnvironmentFault, match=r"\d+ (Fused)?MatMul by CPUExecutionProvider"):
        require_placed(Pretending(), CUDA, path)


def test_an_onnx_runner_has_the_settings_of_what_it_has_opened(
    exported: Exported, mixed_batch: Batch
) -> None:
    runner = OnnxRunner(exported.folder)
    assert runner.settings == {}
    runner.run(replace(mixed_batch), 1)
    assert list(runner.settings) == ["decoder", "embedding", "vision"]
    assert all("CPUExecutionProvider" in said for said in runner.settings.values())
