"""A small sound bundle to damage, and limits under which its readers must stay."""

from __future__ import annotations

import json
import resource
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from guardbake.artifact import save_guard
from guardbake.bundle.files import describe
from guardbake.bundle.manifest import (
    CERTIFICATE,
    DECODER,
    GUARD,
    RECIPE,
    EngineBuilt,
    Manifest,
    Origins,
    write_manifest,
)
from guardbake.bundle.papers import seal
from guardbake.passes.insert import InsertGuard
from guardbake.site import Site
from guardbake.spec import GuardSpec

from tests.certificates import small_certificate
from tests.fuzz.targets import NAMES, RECORD

ROUND = 5000  # cases under one seed: hypothesis remembers them all while a round lasts
MEMORY = 2 << 30  # bytes of address space beyond what the process has when a round begins
SECONDS = 30  # of the processor, for one case; sound files take milliseconds


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One round a target, more if more cases are asked for."""
    if "round_" in metafunc.fixturenames:
        cases = metafunc.config.getoption("--cases") // len(NAMES)
        rounds = [min(ROUND, cases - begin) for begin in range(0, max(cases, 1), ROUND)]
        metafunc.parametrize("name", NAMES)
        metafunc.parametrize("round_", enumerate(rounds), ids=[str(n) for n in range(len(rounds))])


class Hang(BaseException):
    """A case took longer than SECONDS; no reader of files can catch this by accident."""


@pytest.fixture
def bounded() -> Iterator[Callable[[], None]]:
    """Bounds memory until the test ends; call it before each case to wind the clock."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY

    def ring(_signal: int, _frame: object) -> None:
        raise Hang

    before = signal.signal(signal.SIGPROF, ring)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    yield lambda: signal.setitimer(signal.ITIMER_PROF, SECONDS) and None
    signal.setitimer(signal.ITIMER_PROF, 0)
    signal.signal(signal.SIGPROF, before)
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@pytest.fixture(scope="session")
def spec(guard: Callable[..., GuardSpec]) -> GuardSpec:
    return guard("sequence", "care", width=8, layers=2, edits=(1,), gains=True)


def decoder() -> ir.Model:
    """Two residual layers of one matrix each, under the names of our exporter."""
    rng = np.random.default_rng(7)
    shape = ["batch", "sequence", 8]
    x = ir.val("inputs_embeds", ir.DataType.FLOAT, shape)
    inputs = [x, ir.val("attention_mask", ir.DataType.INT64, ["batch", "total"])]
    nodes: list[ir.Node] = []
    weights: list[ir.Value] = []
    for layer in range(2):
        array = rng.standard_normal((8, 8)).astype(np.float32)
        weights.append(ir.val(f"w{layer}", const_value=ir.tensor(array, name=f"w{layer}")))
        name = Site(layer, "ffn_output").onnx_value
        product = ir.node("MatMul", [x, weights[-1]], name=name)
        total = ir.node("Add", [x, product.outputs[0]], name=f"residual {layer}")
        for node in (product, total):
            node.outputs[0].name = str(node.name)
            node.outputs[0].dtype, node.outputs[0].shape = ir.DataType.FLOAT, ir.Shape(shape)
        nodes += [product, total]
        x = total.outputs[0]
    x.name = "logits"
    graph = ir.Graph(
        inputs, [x], nodes=nodes, initializers=weights, opset_imports={"": 23}, name="decoder"
    )
    return ir.Model(graph, ir_version=10)


@pytest.fixture(scope="session")
def sound(spec: GuardSpec, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest]:
    """A bundle with weights, an engine's record and papers."""
    folder = tmp_path_factory.mktemp("fuzz") / "bundle"
    folder.mkdir()
    ir.save(decoder(), folder / DECODER, external_data=f"{DECODER}.data", size_threshold_bytes=64)
    model = ir.load(folder / DECODER)
    nodes = InsertGuard(spec)(model).nodes
    ir.save(model, folder / DECODER)
    save_guard(spec, folder / GUARD)
    (folder / "decoder.engine").write_bytes(b"an engine")
    graph, engine = describe(folder, DECODER), describe(folder, "decoder.engine")
    data = describe(folder, f"{DECODER}.data")
    record = {
        "status": "compiled",
        "engine_sha256": engine.sha256,
        "engine_bytes": engine.size,
        "onnx_sha256": graph.sha256,
        "data_sha256": [[data.name, data.sha256]],
        "settings": [["TF32", "False"], ["STRICT_NANS", "True"]],
        "guard_digest": spec.digest,
        "guard": [{"node": node, "layers": ["layer"]} for node in nodes],
    }
    (folder / RECORD).write_text(json.dumps(record))
    said = small_certificate(spec.model.digest, spec.digest, {DECODER: graph.sha256})
    (folder / CERTIFICATE).write_text(json.dumps(said))
    origins = Origins(spec.model.digest, {"fit": "1" * 64}, spec.digest, EngineBuilt((RECORD,)))
    (folder / RECIPE).write_text('{"name": "small"}')
    manifest = seal(folder, origins)
    write_manifest(folder, manifest)
    return folder, manifest
