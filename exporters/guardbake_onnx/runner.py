"""Run an exported model in onnxruntime, on the CPU or by CUDA: numpy in, numpy out, no torch."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any, Final, cast

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnxruntime

from guardbake.errors import UnsupportedError, UsageError

from guardbake_onnx.description import read_description
from guardbake_onnx.executor import GraphInput, Resident
from guardbake_onnx.loop import ExecutorRunner
from guardbake_onnx.provider import CPU, CUDA, Provider, on_the_cpu, open_session

Array = npt.NDArray[Any]

_BFLOAT16: Final = np.dtype(ml_dtypes.bfloat16)
_BFLOAT16_NUMBER: Final = 16  # of ONNX's TensorProto
_DTYPES: Final[dict[str, np.dtype[Any]]] = {
    "tensor(float)": np.dtype(np.float32),
    "tensor(float16)": np.dtype(np.float16),
    "tensor(bfloat16)": _BFLOAT16,
    "tensor(int32)": np.dtype(np.int32),
    "tensor(int64)": np.dtype(np.int64),
    "tensor(bool)": np.dtype(np.bool_),
}


class OnnxRunner(ExecutorRunner):
    """The Runner of a folder that OnnxExporter wrote, guarded or not; group `guardbake.runners`.

    threads: of onnxruntime's kernels, 0 for one a core.
    """

    provider: Provider = CPU

    def __init__(self, folder: Path, engines: Path | None = None, *, threads: int = 0) -> None:
        if engines is not None:
            raise UsageError(
                found=f"engines in {engines}",
                expected="none: onnxruntime runs the graphs of the bundle",
                where="the runner",
                remedy="name the runner rtx or tensorrt, or leave the engines out",
            )

        def open_graph(name: str) -> OrtExecutor:
            path = folder / f"{name}.onnx"
            return OrtExecutor(open_session(path, threads, self.provider), self.provider)

        super().__init__(read_description(folder), open_graph)
        self.folder = folder


class CudaRunner(OnnxRunner):
    """The same on an NVIDIA GPU, float32 products without TF32."""

    provider = CUDA


class OrtExecutor:
    """A session whose inputs and outputs are bound to a device; see `executor.Executor`.

    Raises UnsupportedError for a graph with an input of another kind than a decoder's.
    """

    rows: int | None = None
    tokens: int | None = None

    def __init__(self, session: onnxruntime.InferenceSession, provider: Provider) -> None:
        self._session = session
        self._device = provider.device
        self.inputs: Mapping[str, GraphInput] = {
            value.name: GraphInput(_dtype(value), _fixed(value)) for value in session.get_inputs()
        }
        self.outputs: tuple[str, ...] = tuple(value.name for value in session.get_outputs())
        self.settings = str(provider)
        if provider is not CPU and (left := on_the_cpu(session)):
            self.settings += f", on the CPU {left}"

    def run(
        self, feeds: Mapping[str, Array], carried: Mapping[str, Resident], keep: Set[str]
    ) -> tuple[dict[str, Array], dict[str, Resident]]:
        """See `executor.Executor`."""
        binding = self._session.io_binding()
        for name, value in feeds.items():
            binding.bind_ortvalue_input(name, _to_ort(value, self.inputs[name].dtype))
        for name, left in carried.items():
            binding.bind_ortvalue_input(name, cast(onnxruntime.OrtValue, left))
        for name in self.outputs:
            binding.bind_output(name, self._device if name in keep else CPU.device)
        binding.synchronize_inputs()
        self._session.run_with_iobinding(binding)
        binding.synchronize_outputs()
        found = dict(zip(self.outputs, binding.get_outputs(), strict=True))
        host = {name: _to_numpy(value) for name, value in found.items() if name not in keep}
        return host, {name: found[name] for name in self.outputs if name in keep}


def _dtype(value: Any) -> np.dtype[Any]:
    if value.type not in _DTYPES:
        raise UnsupportedError(
            found=f"input {value.name} of type {value.type}",
            expected=f"one of {', '.join(_DTYPES)}",
            where="the graph",
            remedy="export the model with guardbake",
        )
    return _DTYPES[value.type]


def _fixed(value: Any) -> tuple[int | None, ...]:
    return tuple(size if isinstance(size, int) else None for size in value.shape)


def _to_ort(value: Array, dtype: np.dtype[Any]) -> onnxruntime.OrtValue:
    whole = np.ascontiguousarray(value)
    if dtype == _BFLOAT16:  # which onnxruntime takes as its bits
        bits = whole.astype(_BFLOAT16, copy=False).view(np.uint16)
        return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, _BFLOAT16_NUMBER)
    return onnxruntime.OrtValue.ortvalue_from_numpy(whole)


def _to_numpy(value: onnxruntime.OrtValue) -> Array:
    """A copy of a tensor in host memory; onnxruntime has no numpy type for bfloat16."""
    if value.data_type() != "tensor(bfloat16)":
        return np.asarray(value.numpy())
    bits = ctypes.string_at(value.data_ptr(), value.tensor_size_in_bytes())
    return np.frombuffer(bits, _BFLOAT16).reshape(value.shape())
