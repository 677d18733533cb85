"""A GPU, its runtime and an engine that are none: host memory, and onnxruntime at the addresses.

What they check is what a real one would: every address belongs to a live allocation of the right
size, every shape to the chosen profile, an aliased output lies over its input. Their numbers are
real, for they run the graph that an engine would be compiled from.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from enum import IntEnum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import tensorrt_rtx

from guardbake_onnx.executor import GraphInput
from guardbake_onnx.provider import CPU, open_session
from guardbake_onnx.runner import OrtExecutor
from guardbake_tensorrt import Backend, load_backend
from guardbake_tensorrt.profile import EngineProfile

_KINDS = {
    np.dtype(np.float32): tensorrt_rtx.DataType.FLOAT,
    np.dtype(np.int32): tensorrt_rtx.DataType.INT32,
    np.dtype(np.int64): tensorrt_rtx.DataType.INT64,
    np.dtype(np.bool_): tensorrt_rtx.DataType.BOOL,
}
# what fresh memory holds: finite, and large enough to be noticed
RUBBISH = 0x42


class HostRuntime:
    """cuda.bindings.runtime over host memory. copied: bytes of every copy, by its direction."""

    cudaError_t = IntEnum(
        "cudaError_t",
        {
            "cudaSuccess": 0,
            "cudaErrorInvalidValue": 1,
            "cudaErrorMemoryAllocation": 2,
            "cudaErrorInsufficientDriver": 35,
            "cudaErrorNoDevice": 100,
        },
    )
    cudaMemcpyKind = IntEnum(
        "cudaMemcpyKind", {"cudaMemcpyHostToDevice": 1, "cudaMemcpyDeviceToHost": 2}
    )

    def __init__(self, devices: int = 1, room: int = 1 << 30) -> None:
        self.live: dict[int, Any] = {}
        self.copied: dict[int, list[int]] = {1: [], 2: []}
        self._devices = devices
        self._room = room

    def cudaGetDeviceCount(self) -> tuple[int, int | None]:
        done = self.cudaError_t.cudaSuccess if self._devices else self.cudaError_t.cudaErrorNoDevice
        return done, self._devices

    def cudaGetDeviceProperties(self, device: int) -> tuple[int, Any]:
        return self.cudaError_t.cudaSuccess, SimpleNamespace(name=b"stand-in\0\0", major=8, minor=9)

    def cudaStreamCreate(self) -> tuple[int, int]:
        return self.cudaError_t.cudaSuccess, 7

    def cudaStreamSynchronize(self, stream: int) -> tuple[int]:
        return (self.cudaError_t.cudaSuccess if stream == 7 else self.cudaError_t(1),)

    def cudaMallocAsync(self, size: int, stream: int) -> tuple[int, int | None]:
        if sum(len(each) for each in self.live.values()) + size > self._room:
            return self.cudaError_t.cudaErrorMemoryAllocation, None
        memory = (ctypes.c_ubyte * size)(*([RUBBISH] * min(size, 64)))
        address = ctypes.addressof(memory)
        self.live[address] = memory
        return self.cudaError_t.cudaSuccess, address

    def cudaFreeAsync(self, address: int, stream: int) -> tuple[int]:
        known = self.live.pop(address, None) is not None
        return (self.cudaError_t.cudaSuccess if known else self.cudaError_t.cudaErrorInvalidValue,)

    def cudaMemcpyAsync(
        self, target: int, source: int, size: int, kind: int, stream: int
    ) -> tuple[int]:
        device = target if kind == self.cudaMemcpyKind.cudaMemcpyHostToDevice else source
        if len(self.live.get(device, b"")) < size:
            return (self.cudaError_t.cudaErrorInvalidValue,)
        ctypes.memmove(target, source, size)
        self.copied[kind].append(size)
        return (self.cudaError_t.cudaSuccess,)


class GraphEngine:
    """ICudaEngine of an ONNX file.

    profiles_used: by call, the profile that was active.
    """

    def __init__(self, path: Path, runtime: HostRuntime, profile: EngineProfile) -> None:
        self.executor = OrtExecutor(open_session(path, 1), CPU)
        self.runtime = runtime
        self.profiles_used: list[int] = []
        self._profile = profile
        self._phases = profile.phases
        self._outputs = {value.name: value for value in self.executor._session.get_outputs()}
        self._names = [*self.executor.inputs, *self.executor.outputs]
        self.num_io_tensors = len(self._names)
        self.num_optimization_profiles = len(self._phases)

    def create_execution_context(self) -> GraphContext:
        return GraphContext(self)

    def get_tensor_name(self, index: int) -> str:
        return self._names[index]

    def get_tensor_mode(self, name: str) -> Any:
        modes = tensorrt_rtx.TensorIOMode
        return modes.INPUT if name in self.executor.inputs else modes.OUTPUT

    def get_tensor_location(self, name: str) -> Any:
        return tensorrt_rtx.TensorLocation.DEVICE

    def get_tensor_dtype(self, name: str) -> Any:
        if name in self.executor.inputs:
            return _KINDS[self.executor.inputs[name].dtype]
        kind = self._outputs[name].type.removeprefix("tensor(").removesuffix(")")
        return _KINDS[np.dtype({"float": "float32"}.get(kind, kind))]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(-1 if size is None else size for size in self.executor.inputs[name].shape)

    def get_tensor_profile_shape(self, name: str, index: int) -> list[tuple[int, ...]]:
        shape = self.get_tensor_shape(name)
        return list(self._profile.shapes(self._phases[index], name, shape))

    def get_aliased_input_tensor(self, name: str) -> str | None:
        written_in_place = "write_indices" in self.executor.inputs and name.startswith("present.")
        return name.replace("present.", "past_key_values.") if written_in_place else None


def backend_of(engine: GraphEngine | None, version: str) -> Backend:
    """A library whose runtime deserialises whatever it is given as `engine`, or refuses it."""

    class Runtime:
        def __init__(self, logger: Any) -> None:
            self._logger = logger

        def deserialize_cuda_engine(self, content: bytes) -> GraphEngine | None:
            if engine is None:
                self._logger.log(tensorrt_rtx.ILogger.Severity.ERROR, "not the capability of plan")
            return engine

    module = SimpleNamespace(__name__="stand-in", Runtime=Runtime)
    real = load_backend("rtx")
    return Backend("rtx", module, version, real.logger, real.log)


class GraphContext:
    """IExecutionContext: computes where the addresses point."""

    def __init__(self, engine: GraphEngine) -> None:
        self._engine = engine
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._made: dict[str, Any] = {}
        self.active_optimization_profile = 0

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        self.active_optimization_profile, self._shapes = index, {}
        return index < self._engine.num_optimization_profiles

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        index = self.active_optimization_profile
        least, _, most = self._engine.get_tensor_profile_shape(name, index)
        self._shapes[name] = tuple(shape)
        return all(a <= size <= b for a, size, b in zip(least, shape, most, strict=True))

    def set_tensor_address(self, name: str, address: int) -> bool:
        self._addresses[name] = address
        return address in self._engine.runtime.live

    def infer_shapes(self) -> list[str]:
        inputs: Mapping[str, GraphInput] = self._engine.executor.inputs
        unknown = [name for name in inputs if name not in self._shapes]
        if not unknown:
            feeds = {name: self._at(name, each.dtype).copy() for name, each in inputs.items()}
            self._made, _ = self._engine.executor.run(feeds, {}, frozenset())
        return unknown

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._made[name].shape)

    def execute_async_v3(self, stream: int) -> bool:
        for name, value in self._made.items():
            self._shapes[name] = value.shape
            self._at(name, value.dtype)[...] = value
            shared = self._engine.get_aliased_input_tensor(name)
            assert shared is None or self._addresses[shared] == self._addresses[name]
        self._engine.profiles_used.append(self.active_optimization_profile)
        return stream == 7

    def _at(self, name: str, dtype: np.dtype[Any]) -> Any:
        """The memory at a tensor's address as an array; it must be large enough."""
        memory = self._engine.runtime.live[self._addresses[name]]
        count = int(np.prod(self._shapes[name]))
        return np.frombuffer(memory, dtype, count).reshape(self._shapes[name])
