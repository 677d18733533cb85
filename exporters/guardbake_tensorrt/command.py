"""The shell command that compiles a lowered graph with the backend's own tool."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from guardbake_tensorrt.backend import Backend
from guardbake_tensorrt.capability import CURRENT
from guardbake_tensorrt.profile import EngineProfile, Shape

_TOOLS: Final = {"rtx": "tensorrt_rtx", "tensorrt": "trtexec"}


def command_line(
    backend: Backend, network: Any, onnx: Path, capabilities: Sequence[str], profile: EngineProfile
) -> str:
    """`trtexec` or `tensorrt_rtx` on the lowered graph `onnx`, for a POSIX shell.

    It does what `build_engine` does but for one setting: STRICT_NANS, which keeps a NaN score from
    being computed away, is in neither tool's options.
    """
    words = [_TOOLS[backend.name], f"--onnx={onnx}", f"--saveEngine={onnx.with_suffix('.engine')}"]
    words += ["--skipInference", "--noTF32"]
    if backend.name == "tensorrt":
        words.append("--stronglyTyped")  # a mode in TensorRT 10, the only one there is since 11
    if tuple(capabilities) != (CURRENT,):
        numbers = ",".join(name.removeprefix("SM") for name in capabilities)
        words.append(f"--computeCapabilities={numbers}")
    return " ".join(map(shlex.quote, (*words, *_profiles(network, profile))))


def _profiles(network: Any, profile: EngineProfile) -> Iterator[str]:
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    dynamic = [(each.name, tuple(each.shape)) for each in inputs if -1 in tuple(each.shape)]
    for index, phase in enumerate(profile.phases if dynamic else ()):
        if len(profile.phases) > 1:
            yield f"--profile={index}"
        shapes = {name: profile.shapes(phase, name, shape) for name, shape in dynamic}
        for step, option in enumerate(("--minShapes", "--optShapes", "--maxShapes")):
            each = ",".join(f"{name}:{_by(shapes[name][step])}" for name in shapes)
            yield f"{option}={each}"


def _by(shape: Shape) -> str:
    return "x".join(map(str, shape))
