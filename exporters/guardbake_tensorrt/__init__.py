"""Engines from guarded ONNX graphs, compiled ahead of time with TensorRT-RTX or TensorRT.

    backend = load_backend("rtx")
    profile = EngineProfile(batch=(1, 1, 4), seq=(1, 64, 512), past=(0, 256, 1024))
    record = build_engine(
        Path("decoder.onnx"), Path("decoder.engine"),
        backend=backend, capabilities=("SM89", "SM120"), profile=profile, guard_nodes=names,
    )

TensorRT-RTX compiles on any machine, without a GPU, and what is promised of an engine is therefore
"accepted and compiled", and its record says so: the guard is in the network that the builder took,
on a path to the output, in float32 without TF32. Whether it computes what the reference does is
seen where the GPU is, by `guardbake parity --runner rtx`.

`load_engine` hands out the bytes of an engine that a verified list names, to whoever has a GPU.
`engines` and `runner` hold the entry points of `guardbake.engines` and `guardbake.runners`.
"""

from guardbake_tensorrt.backend import Backend, BackendName, load_backend
from guardbake_tensorrt.build import build_engine
from guardbake_tensorrt.load import load_engine
from guardbake_tensorrt.profile import EngineProfile
from guardbake_tensorrt.record import EngineRecord, GuardLayers

__all__ = [
    "Backend",
    "BackendName",
    "EngineProfile",
    "EngineRecord",
    "GuardLayers",
    "build_engine",
    "load_backend",
    "load_engine",
]
