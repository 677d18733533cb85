"""Execute one engine on the GPU at hand: addresses, shapes and profiles, nothing about decoding.

Not yet run on any GPU: see GPU.md in the repository.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any, Final, cast

import ml_dtypes
import numpy as np
import numpy.typing as npt

from guardbake.errors import EnvironmentFault, UnsupportedError, UsageError

from guardbake_onnx.executor import GraphInput, Resident
from guardbake_tensorrt.backend import Backend
from guardbake_tensorrt.device import CudaDevice, DeviceTensor
from guardbake_tensorrt.load import load_engine

Array = npt.NDArray[Any]
Shape = tuple[int, ...]

_DTYPES: Final[dict[str, np.dtype[Any]]] = {
    "FLOAT": np.dtype(np.float32),
    "HALF": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "INT32": np.dtype(np.int32),
    "INT64": np.dtype(np.int64),
    "BOOL": np.dtype(np.bool_),
}
_TOKENS: Final = ("inputs_embeds", "input_ids")
"""Inputs [B, S, ...] that say how many rows and tokens a call has."""


class EngineExecutor:
    """A deserialised engine with a context of its own; see guardbake_onnx.executor.Executor.

    A cache of fixed capacity is written in place: where the engine says that an output lies in an
    input's memory, it gets that input's address. Raises UnsupportedError for an engine that wants
    tensors in host memory.
    """

    def __init__(self, engine: Any, device: CudaDevice, settings: str) -> None:
        self._engine = engine
        self._device = device
        self._context = engine.create_execution_context()
        names = [str(engine.get_tensor_name(i)) for i in range(engine.num_io_tensors)]
        modes = {name: engine.get_tensor_mode(name).name for name in names}
        self._dtypes = {name: self._dtype(name) for name in names}
        self.inputs: Mapping[str, GraphInput] = {
            name: GraphInput(self._dtypes[name], _free(engine.get_tensor_shape(name)))
            for name in names
            if modes[name] == "INPUT"
        }
        self.outputs: tuple[str, ...] = tuple(n for n in names if modes[n] == "OUTPUT")
        self._profiles = tuple(
            {
                name: self._range(name, index)
                for name, each in self.inputs.items()
                if None in each.shape
            }
            for index in range(engine.num_optimization_profiles)
        )
        most = [p[name][1] for p in self._profiles for name in _TOKENS if name in p]
        self.rows: int | None = max((shape[0] for shape in most), default=None)
        self.tokens: int | None = max((shape[1] for shape in most), default=None)
        self.settings = f"{settings} on {device.name}"

    def run(
        self, feeds: Mapping[str, Array], carried: Mapping[str, Resident], keep: Set[str]
    ) -> tuple[dict[str, Array], dict[str, Resident]]:
        """See guardbake_onnx.executor.Executor. Raises UsageError for shapes of no profile."""
        given = {name: cast(DeviceTensor, left) for name, left in carried.items()}
        for name, value in feeds.items():
            given[name] = self._device.upload(value.astype(self._dtypes[name], copy=False))
        self._choose_profile({name: tensor.shape for name, tensor in given.items()})
        for name, tensor in given.items():
            self._require(self._context.set_input_shape(name, tensor.shape), f"the shape of {name}")
            self._bind(name, tensor)
        unknown = self._context.infer_shapes()
        self._require(not unknown, f"shapes without {', '.join(unknown)}")
        made = {name: self._placed(name, given) for name in self.outputs}
        for name, tensor in made.items():
            self._bind(name, tensor)
        self._require(self._context.execute_async_v3(self._device.stream), "the call")
        host = {name: tensor.numpy() for name, tensor in made.items() if name not in keep}
        return host, {name: made[name] for name in self.outputs if name in keep}

    def _placed(self, name: str, given: Mapping[str, DeviceTensor]) -> DeviceTensor:
        """Where output `name` goes: over the input whose memory it shares, or somewhere new."""
        shared = self._engine.get_aliased_input_tensor(name)
        if shared:
            return given[shared]
        shape = tuple(int(size) for size in self._context.get_tensor_shape(name))
        return self._device.empty(shape, self._dtypes[name])

    def _bind(self, name: str, tensor: DeviceTensor) -> None:
        self._require(self._context.set_tensor_address(name, tensor.address), f"a place for {name}")

    def _choose_profile(self, shapes: Mapping[str, Shape]) -> None:
        """The last profile that has these shapes: that of decoding stands behind those of prefill,
        and takes single tokens only."""
        for index in reversed(range(len(self._profiles))):
            ranges = self._profiles[index]
            if all(_within(shapes[name], ranges[name]) for name in ranges):
                if self._context.active_optimization_profile != index:
                    chosen = self._context.set_optimization_profile_async(
                        index, self._device.stream
                    )
                    self._require(chosen, f"profile {index}")
                return
        beyond = sorted(
            name
            for name in shapes
            if not any(_within(shapes[name], p[name]) for p in self._profiles if name in p)
        )
        told = beyond or sorted(shapes)
        raise UsageError(
            found=", ".join(f"{name} {list(shapes[name])}" for name in told),
            expected="; ".join(
                ", ".join(f"{n} {list(p[n][0])} to {list(p[n][1])}" for n in told if n in p)
                for p in self._profiles
            ),
            where="the engine's profiles",
            remedy="build the engine for such sizes: --batch, --sequence, --past, --images",
        )

    def _dtype(self, name: str) -> np.dtype[Any]:
        kind = self._engine.get_tensor_dtype(name).name
        place = self._engine.get_tensor_location(name).name
        if kind not in _DTYPES or place != "DEVICE":
            raise UnsupportedError(
                found=f"tensor {name} of {kind} in the memory of {place}",
                expected=f"one of {', '.join(_DTYPES)} on the device",
                where="the engine",
                remedy="build an engine of a graph that guardbake exported",
            )
        return _DTYPES[kind]

    def _range(self, name: str, index: int) -> tuple[Shape, Shape]:
        least, _, most = self._engine.get_tensor_profile_shape(name, index)
        return tuple(least), tuple(most)

    def _require(self, done: object, what: str) -> None:
        if not done:
            raise EnvironmentFault(
                found=f"{what} refused",
                expected="a call that the engine takes",
                where=self.settings,
                remedy="see GPU.md, and report this with the engine's record",
            )


def open_engine(
    folder: Path, name: str, backend: Backend, device: CudaDevice, bundle: Path | None
) -> EngineExecutor:
    """The engine `name`, verified against its record and its list, on the device.

    Raises as `load_engine` does, and EnvironmentFault, with the library's own words, if it does not
    take the engine here.
    """
    record, content = load_engine(folder, name, backend, bundle)
    runtime = backend.module.Runtime(backend.logger)
    engine = runtime.deserialize_cuda_engine(content)
    said = "; ".join(text for _, text in backend.log.drain())
    if engine is None:
        raise EnvironmentFault(
            found=f"{backend} that does not take the engine: {said or 'no reason given'}"[:600],
            expected=f"a GPU of {', '.join(record.capabilities)}, not {device.name}",
            where=str(folder / f"{name}.engine"),
            remedy="build the engine for this GPU: guardbake build --gpu",
        )
    choices = ", ".join(f"{key} {value}" for key, value in record.settings)
    settings = f"{backend}, engine {record.engine_sha256[:12]}, {choices},"
    return EngineExecutor(engine, device, settings)


def _free(shape: Any) -> tuple[int | None, ...]:
    return tuple(None if size == -1 else int(size) for size in shape)


def _within(shape: Shape, limits: tuple[Shape, Shape]) -> bool:
    return len(shape) == len(limits[0]) and all(
        least <= size <= most for least, size, most in zip(limits[0], shape, limits[1], strict=True)
    )
