"""Run a bundle's engines on the GPU that they were compiled for; group `guardbake.runners`."""

from __future__ import annotations

from pathlib import Path

from guardbake.errors import EnvironmentFault

from guardbake_onnx.description import read_description
from guardbake_onnx.executor import Executor
from guardbake_onnx.loop import ExecutorRunner
from guardbake_tensorrt.backend import BackendName, load_backend
from guardbake_tensorrt.device import open_device
from guardbake_tensorrt.execute import open_engine


class RtxRunner(ExecutorRunner):
    """The Runner of a bundle's engines, by TensorRT-RTX.

    engines: a folder that `guardbake build` made of the bundle; None if they lie in the bundle. The
    decoder must be among them. Vision tower or embedding without an engine are computed by
    onnxruntime on the CPU, which `settings` says. Raises EnvironmentFault unless library and GPU
    are there, IntegrityError for an engine that is not what its list and its record say.
    """

    backend: BackendName = "rtx"

    def __init__(self, folder: Path, engines: Path | None = None) -> None:
        backend, device = load_backend(self.backend), open_device()
        built = folder if engines is None else engines
        bundle = None if engines is None else folder

        def open_graph(name: str) -> Executor:
            if name != "decoder" and not (built / f"{name}.engine").is_file():
                return _on_the_cpu(folder / f"{name}.onnx")
            return open_engine(built, name, backend, device, bundle)

        super().__init__(read_description(folder), open_graph)


class TensorRtRunner(RtxRunner):
    """The same by TensorRT, for data-centre and Jetson GPUs."""

    backend = "tensorrt"


def _on_the_cpu(graph: Path) -> Executor:
    try:
        from guardbake_onnx.provider import CPU, open_session
        from guardbake_onnx.runner import OrtExecutor
    except ImportError as error:
        raise EnvironmentFault(
            found=f"no engine for {graph.name}, and no onnxruntime ({error})",
            expected="either",
            where=str(graph.parent),
            remedy="build all engines of the bundle with guardbake build, or install onnxruntime",
        ) from error
    return OrtExecutor(open_session(graph, 0), CPU)
