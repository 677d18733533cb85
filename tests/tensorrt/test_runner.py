"""The engine runner: what it feeds, against the PyTorch reference, on a GPU that is a stand-in.

The graph is the one that an engine is compiled from, its cache static and written in place. No
engine is executed here: what is new on a GPU is TensorRT's own arithmetic.
"""

from __future__ import annotations

import gc
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import tensorrt_rtx

from guardbake.batch import Batch
from guardbake.check.comparison import Budget, Budgets
from guardbake.check.parity import Pair, compare
from guardbake.errors import EnvironmentFault, ResourceFault, UnsupportedError, UsageError
from guardbake.passes.insert import InsertGuard
from guardbake.passes.probe import TapGuard
from guardbake.plugins import EngineSizes, Trace, find_runner
from guardbake.site import Site
from guardbake.spec import GuardSpec
from guardbake.vlm.runner import TorchRunner

from guardbake_onnx.loop import ExecutorRunner
from guardbake_onnx.provider import CPU, open_session
from guardbake_onnx.runner import OrtExecutor
from guardbake_tensorrt import Backend
from guardbake_tensorrt.device import CudaDevice, open_device
from guardbake_tensorrt.execute import EngineExecutor, open_engine
from guardbake_tensorrt.lower import lower_graph, read_graph
from guardbake_tensorrt.sizes import profile_for
from tests.onnx.conftest import Exported
from tests.onnx.guarding import between
from tests.tensorrt.bundles import Built
from tests.tensorrt.standins import GraphEngine, HostRuntime, backend_of

STEPS, CAPACITY = 8, 128
NOISE = Budget(1e-4, "float32 noise of another summation order, values of order 1 to 10")
BUDGETS = Budgets(NOISE, NOISE, NOISE, Budget(1e-3, "ten times the score's noise"))
# 2 rows at most of a batch of 3
SIZES = EngineSizes((1, 1, 2), (1, 32, CAPACITY), (0, 32, CAPACITY - 1))


@dataclass(frozen=True)
class Case:
    """A guarded model, its decoder as engines get it, and what the reference says of a batch."""

    exported: Exported
    spec: GuardSpec
    static: Path
    growing: Path
    truth: Trace
    undefended: Trace


@pytest.fixture(scope="module", params=["sequence", "replace"])
def case(
    request: pytest.FixtureRequest,
    exported: Exported,
    mixed_batch: Batch,
    guard: Callable[..., GuardSpec],
    tmp_path_factory: pytest.TempPathFactory,
) -> Case:
    """A sequence guard; of "replace" the edits are told what the prompt says without its image."""
    config = exported.vlm.model.config.get_text_config()  # type: ignore[attr-defined]
    spec = guard(
        "sequence",
        "care" if request.param == "sequence" else "replace",
        width=config.hidden_size,
        layers=config.num_hidden_layers,
        sensor=Site(1, "residual"),
        edits=(2, 4),
        strength=2.0,
        threshold=0.0,
    )
    scores = TorchRunner(exported.vlm, spec).run(mixed_batch, 1).guard_score
    assert scores is not None
    spec = between(spec, 0, scores[:, mixed_batch.input_ids.shape[1] - 1, 0])
    growing = tmp_path_factory.mktemp("growing") / "decoder.onnx"
    model = ir.load(exported.folder / "decoder.onnx")
    InsertGuard(spec)(model)
    TapGuard()(model)
    ir.save(model, growing)
    shutil.copyfile(exported.folder / "decoder.onnx.data", growing.with_name("decoder.onnx.data"))
    static = growing.with_name("static.onnx")
    lowered = lower_graph(growing, read_graph(growing), cache="static", capacity=CAPACITY)
    static.write_bytes(lowered.serialized)
    truth = TorchRunner(exported.vlm, spec).run(mixed_batch, STEPS)
    steps, fed = truth.tokens.shape[1], truth.tokens
    undefended = TorchRunner(exported.vlm, None).run(mixed_batch, steps, fed)
    return Case(exported, spec, static, growing, truth, undefended)


def _runner(case: Case, decoder: Any, embedding: Any = None) -> ExecutorRunner:
    """`decoder` executes the decoder, onnxruntime the rest."""
    folder = case.exported.folder

    def open_graph(name: str) -> Any:
        if name == "decoder":
            return decoder
        if name == "embedding" and embedding is not None:
            return embedding
        return OrtExecutor(open_session(folder / f"{name}.onnx", 0), CPU)

    return ExecutorRunner(case.exported.runner.description, open_graph)


def _require_parity(case: Case, runner: ExecutorRunner, batch: Batch) -> None:
    steps, fed = case.truth.tokens.shape[1], case.truth.tokens
    forced, free = runner.run(batch, steps, fed), runner.run(batch, STEPS)
    chunked = runner.run(batch, steps, fed, chunk=7)
    pairs = [
        Pair("mixed", case.truth, forced, free, case.undefended),
        Pair("in chunks", case.truth, chunked, None, None),
    ]
    report = compare(pairs, BUDGETS, gated=True)
    assert not [(c.quantity, c.worst, c.where) for c in report.comparisons if not c.passed]
    assert forced.guard_state is not None
    assert case.truth.guard_state is not None
    assert np.array_equal(forced.guard_state, case.truth.guard_state)


def test_a_static_cache_is_fed_as_the_reference_computes(case: Case, mixed_batch: Batch) -> None:
    """The feeding alone: onnxruntime executes the lowered graph, nothing of a GPU is in play."""
    runner = _runner(case, OrtExecutor(open_session(case.static, 0), CPU))
    _require_parity(case, runner, mixed_batch)


@dataclass
class Stand:
    runtime: HostRuntime
    engine: GraphEngine
    executor: EngineExecutor


def _stand(path: Path, sizes: EngineSizes = SIZES) -> Stand:
    """Of the profiles that such an engine is built with."""
    runtime, model = HostRuntime(), ir.load(path)
    static = any(value.name == "write_indices" for value in model.graph.inputs)
    profile = profile_for(model, sizes, growing=not static)
    engine = GraphEngine(path, runtime, profile)
    return Stand(runtime, engine, EngineExecutor(engine, CudaDevice(runtime), "a stand-in"))


@pytest.mark.parametrize("cache", ["static", "growing"])
def test_an_engine_is_fed_as_the_reference_computes(
    case: Case, mixed_batch: Batch, cache: str
) -> None:
    stand = _stand(case.static if cache == "static" else case.growing)
    assert (stand.executor.rows, stand.executor.tokens) == (2, CAPACITY)
    assert stand.executor.settings == "a stand-in on stand-in"
    _require_parity(case, _runner(case, stand.executor), mixed_batch)
    assert set(stand.engine.profiles_used) == ({0, 1} if cache == "static" else {0, 1, 2})
    gc.collect()
    assert not stand.runtime.live


def _passes(case: Case) -> int:
    """Prefills of a prompt: edits that are to know what it says hear it first."""
    return 2 if case.spec.edits[0].kind == "replace" else 1


def test_no_cache_passes_through_host_memory(case: Case, mixed_batch: Batch) -> None:
    stand = _stand(case.static)
    _runner(case, stand.executor).run(mixed_batch, STEPS, keep_prefill=False)
    description = case.exported.runner.description
    caches = [
        2 * rows * description.kv_heads * CAPACITY * description.head_dim * 4 // 2
        for rows in (1, 2)
    ]
    sent, fetched = stand.runtime.copied[1], stand.runtime.copied[2]
    for size in caches:  # one group of two rows and one of one
        assert sent.count(size) == 2 * description.layers * _passes(case)
        assert size not in fetched


def test_decoding_beyond_the_capacity_or_the_profile_is_refused(
    case: Case, mixed_batch: Batch
) -> None:
    runner = _runner(case, _stand(case.static).executor)
    with pytest.raises(UsageError, match="capacity of the cache"):
        runner.run(mixed_batch, CAPACITY, np.full((3, CAPACITY), 9))
    narrow = EngineSizes((1, 1, 4), (1, 4, 8), (0, 4, 8))
    with pytest.raises(UsageError, match=r"past_key_values.*--past"):
        _runner(case, _stand(case.growing, narrow).executor).run(mixed_batch, 1)


@pytest.mark.parametrize("cache", ["static", "growing"])
def test_a_prompt_longer_than_the_engine_takes_is_fed_in_pieces(
    case: Case, mixed_batch: Batch, cache: str
) -> None:
    longest = mixed_batch.input_ids.shape[1]
    sizes = EngineSizes((1, 1, 2), (1, 4, 8), (0, 8, CAPACITY - 1))
    stand = _stand(case.static if cache == "static" else case.growing, sizes)
    assert stand.executor.tokens == 8 < longest
    embedding = OrtExecutor(open_session(case.exported.folder / "embedding.onnx", 0), CPU)
    embedding.tokens = 8
    runner = _runner(case, stand.executor, embedding)
    forced = runner.run(mixed_batch, case.truth.tokens.shape[1], case.truth.tokens)
    report = compare([Pair("mixed", case.truth, forced, None, None)], BUDGETS, gated=True)
    missing = {"tokens"}  # nothing was decoded freely
    assert not [c for c in report.comparisons if not c.passed and c.gate not in missing]
    prompts = 2 * _passes(case)  # of two groups
    begun = stand.engine.profiles_used.count(0)
    assert begun > prompts if cache == "static" else begun == prompts


@pytest.fixture
def stand(case: Case) -> Stand:
    return _stand(case.static)


def test_what_the_library_refuses_is_an_error(
    stand: Stand, case: Case, mixed_batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = _runner(case, stand.executor)
    context = stand.executor._context
    for name in ("set_input_shape", "set_tensor_address", "execute_async_v3"):
        with monkeypatch.context() as patch:
            patch.setattr(context, name, lambda *_: False)
            with pytest.raises(EnvironmentFault, match="refused"):
                runner.run(mixed_batch, 1)
    with monkeypatch.context() as patch:
        patch.setattr(context, "infer_shapes", lambda: ["guard_state"])
        with pytest.raises(EnvironmentFault, match="without guard_state"):
            runner.run(mixed_batch, 1)
    with monkeypatch.context() as patch:
        host = tensorrt_rtx.TensorLocation.HOST
        patch.setattr(stand.engine, "get_tensor_location", lambda _: host)
        with pytest.raises(UnsupportedError, match="memory of HOST"):
            EngineExecutor(stand.engine, CudaDevice(stand.runtime), "")


def test_a_machine_without_a_gpu_says_so() -> None:
    with pytest.raises(EnvironmentFault, match="cudaErrorNoDevice"):
        CudaDevice(HostRuntime(devices=0))
    with pytest.raises(ResourceFault, match="cudaMallocAsync without memory"):
        CudaDevice(HostRuntime(room=10)).upload(np.zeros(11, np.uint8))
    device = CudaDevice(HostRuntime())
    lost = device.empty((2,), np.dtype(np.int64))
    device.release(lost.address)
    with pytest.raises(EnvironmentFault, match="cudaMemcpyAsync: cudaErrorInvalidValue"):
        lost.numpy()


def test_the_runner_imports_nothing_that_only_a_gpu_needs() -> None:
    code = (
        "import sys, guardbake_tensorrt.runner;"
        "heavy = {'torch', 'transformers', 'onnxruntime', 'tensorrt_rtx', 'tensorrt', 'cuda'};"
        "print(*heavy.intersection(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.split()) == (0, [])


def test_here_there_is_none() -> None:
    """With cuda-bindings installed it is the driver that lacks, without them the bindings."""
    with pytest.raises(EnvironmentFault, match=r"NVIDIA GPU|bindings") as caught:
        open_device()
    assert caught.value.exit_code == 7


def test_an_engine_that_the_gpu_does_not_take_is_refused_in_the_librarys_words(
    built: Built, bundle: Path, backend: Backend
) -> None:
    refusing = backend_of(None, backend.version)
    with pytest.raises(EnvironmentFault, match=r"capability of plan.*SM89.*not stand-in"):
        open_engine(built.folder, "decoder", refusing, CudaDevice(HostRuntime()), bundle)


@pytest.mark.parametrize("name", ["rtx", "tensorrt"])
def test_a_runner_of_engines_needs_library_and_gpu(name: str, exported: Exported) -> None:
    with pytest.raises(EnvironmentFault, match=r"the machine that has the GPU|with an NVIDIA GPU"):
        find_runner(name)(exported.folder)
