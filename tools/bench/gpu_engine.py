"""An engine of a tiny model: built here, loaded on the GPU at hand, held to the reference; gpu.py.

What a GPU that TensorRT-RTX does not know says to such an engine is a result too: it is recorded in
the library's own words.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpu_outcome import Outcome
from gpu_parity import Tiny, export_guarded, load_tiny, measured, noise_of
from random_decoders import FamilyName

from guardbake.artifact import save_guard
from guardbake.bundle.manifest import GUARD
from guardbake.errors import EnvironmentFault, UnsupportedError, UsageError
from guardbake.plugins import EngineSizes, Number
from guardbake.progress import PlainReporter
from guardbake.steps.engines import EngineOrder, build_engines

from guardbake_onnx.executor import Executor
from guardbake_onnx.loop import ExecutorRunner
from guardbake_onnx.provider import CPU, open_session
from guardbake_onnx.runner import OnnxRunner, OrtExecutor
from guardbake_tensorrt import load_backend
from guardbake_tensorrt.device import CudaDevice, open_device
from guardbake_tensorrt.execute import open_engine

CAPACITY = 256
_OTHERWISE = "sm89"  # where the GPU at hand is none that TensorRT-RTX compiles for


def _build(model: Path, out: Path, number: Number, gpu: str) -> dict[str, Any]:
    sizes = EngineSizes(batch=(1, 2, 4), sequence=(1, 64, CAPACITY), past=(0, 64, CAPACITY - 1))
    order = EngineOrder("rtx", (gpu,), sizes, ("decoder",), number=number, capacity=CAPACITY)
    (record,) = build_engines(model, out, order, PlainReporter(sys.stderr)).values()
    layers = {layer for each in record["guard"] for layer in each["layers"]}
    return {
        "compiled for": gpu,
        "seconds": record["seconds"],
        "network layers": record["layers"],
        "of the guard": len(layers),
        "guard nodes": len(record["guard"]),
    }


def _run(tiny: Tiny, model: Path, engines: Path, device: CudaDevice, number: Number) -> Any:
    """Figures of the engine, or the library's words."""
    backend, plain = load_backend("rtx"), OnnxRunner(model)
    try:
        decoder = open_engine(engines, "decoder", backend, device, None)
    except EnvironmentFault as error:
        return {"not loaded": str(error)}

    def open_graph(name: str) -> Executor:
        if name == "decoder":
            return decoder
        return OrtExecutor(open_session(model / f"{name}.onnx", 0), CPU)

    runner = ExecutorRunner(plain.description, open_graph)
    steps, fed = tiny.truth.tokens.shape[1], tiny.truth.tokens
    found = measured(tiny, runner.run(tiny.batch, steps, fed), noise_of(tiny, number))
    return found | {"settings": runner.settings}


def check(family: FamilyName, folder: Path, numbers: Sequence[Number]) -> Outcome:
    """Built whatever the machine; loaded and run where there is a GPU."""
    load_backend("rtx")
    tiny = load_tiny(family)
    model = export_guarded(tiny, "float32", folder, tapped=False)
    save_guard(tiny.spec, model / GUARD)
    device, said = None, ""
    try:
        device = open_device()
    except EnvironmentFault as error:
        said = f"compiled, not loaded: {error}"
    figures: dict[str, Any] = {}
    for number in numbers:
        out = folder / f"engines-{number}"
        gpu = _OTHERWISE if device is None else device.capability
        try:
            built = _build(model, out, number, gpu)
        except (UnsupportedError, UsageError) as error:
            built = {f"refused {gpu}": str(error), **_build(model, out, number, _OTHERWISE)}
        run = {} if device is None else {"run": _run(tiny, model, out, device, number)}
        figures[number] = built | run
    return Outcome("done" if device else "not run", said, figures)
