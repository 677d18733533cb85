"""Memory of one GPU, by NVIDIA's own bindings of the CUDA runtime (`cuda-bindings`).

Why these and not PyTorch, which could hold tensors too: who executes engines has a driver and the
engines' library, and needs 8 MB more, not a framework with a second copy of CUDA; the bindings are
NVIDIA's, follow its runtime release by release, and promise its API. They are imported when a
device is opened.
"""

from __future__ import annotations

import importlib
import weakref
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from guardbake.errors import EnvironmentFault, ResourceFault

Array = npt.NDArray[Any]

_PACKAGE: Final = "cuda.bindings.runtime"
_WHERE: Final = "the GPU of this machine"


class CudaDevice:
    """The first CUDA device and one stream, on which everything happens in order.

    name, capability: "NVIDIA GeForce RTX 4090" and "sm89", say.
    runtime: the module cuda.bindings.runtime, typed Any because it ships no complete stubs. Raises
    EnvironmentFault if there is no device, and on any later error but ResourceFault when its memory
    is full.
    """

    def __init__(self, runtime: Any) -> None:
        self._runtime = runtime
        if not self._call("cudaGetDeviceCount"):
            raise _no_device("no CUDA device")
        said = self._call("cudaGetDeviceProperties", 0)
        self.name = bytes(said.name).rstrip(b"\0").decode()
        self.capability = f"sm{said.major}{said.minor}"
        self.stream = int(self._call("cudaStreamCreate"))

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> DeviceTensor:
        """A tensor of whatever was in that memory."""
        nbytes = int(np.prod(shape)) * dtype.itemsize
        # an engine wants an address of a tensor without elements as well
        address = int(self._call("cudaMallocAsync", max(nbytes, 1), self.stream))
        return DeviceTensor(self, address, shape, dtype)

    def upload(self, array: Array) -> DeviceTensor:
        """A copy of the array."""
        whole = np.ascontiguousarray(array)
        tensor = self.empty(whole.shape, whole.dtype)
        self._copy(tensor.address, whole.ctypes.data, whole.nbytes, "cudaMemcpyHostToDevice")
        return tensor

    def download(self, tensor: DeviceTensor) -> Array:
        """A copy of the tensor, once all that was asked for before is done."""
        array = np.empty(tensor.shape, tensor.dtype)
        self._copy(array.ctypes.data, tensor.address, array.nbytes, "cudaMemcpyDeviceToHost")
        self._call("cudaStreamSynchronize", self.stream)
        return array

    def release(self, address: int) -> None:
        """Give memory back, once all that was asked for before is done."""
        self._runtime.cudaFreeAsync(address, self.stream)

    def _copy(self, target: int, source: int, nbytes: int, kind: str) -> None:
        way = getattr(self._runtime.cudaMemcpyKind, kind)
        if nbytes:
            self._call("cudaMemcpyAsync", target, source, nbytes, way, self.stream)

    def _call(self, name: str, *arguments: Any) -> Any:
        """What the function returns beside its error code, None if nothing."""
        error, *found = getattr(self._runtime, name)(*arguments)
        codes = self._runtime.cudaError_t
        if error == codes.cudaErrorMemoryAllocation:
            raise ResourceFault(
                found=f"{name} without memory",
                expected="room for the cache and the activations",
                where=_WHERE,
                remedy="use an engine of a smaller batch or capacity, or a larger GPU",
            )
        if error in (codes.cudaErrorNoDevice, codes.cudaErrorInsufficientDriver):
            raise _no_device(error.name)
        if error != codes.cudaSuccess:
            raise EnvironmentFault(
                found=f"{name}: {error.name}",
                expected="success",
                where=_WHERE,
                remedy="see whether nvidia-smi shows the GPU in order, and run again",
            )
        return found[0] if found else None


class DeviceTensor:
    """address: of the first element. The memory is given back with the last reference."""

    def __init__(
        self, device: CudaDevice, address: int, shape: tuple[int, ...], dtype: np.dtype[Any]
    ) -> None:
        self._device = device
        self.address = address
        self.shape = shape
        self.dtype = dtype
        weakref.finalize(self, device.release, address)

    def numpy(self) -> Array:
        """A copy in host memory."""
        return self._device.download(self)


def open_device() -> CudaDevice:
    """The GPU of this machine; EnvironmentFault if it has none, or no bindings to reach it."""
    try:
        runtime = importlib.import_module(_PACKAGE)
    except ImportError as error:
        raise EnvironmentFault(
            found=f"no Python module {_PACKAGE} ({error})",
            expected="the bindings of the CUDA runtime",
            where=_WHERE,
            remedy="on a machine with an NVIDIA GPU, run `pip install 'guardbake[engines]'`",
        ) from error
    return CudaDevice(runtime)


def _no_device(found: str) -> EnvironmentFault:
    return EnvironmentFault(
        found=found,
        expected="an NVIDIA GPU with a driver as new as the CUDA bindings",
        where=_WHERE,
        remedy="run this on the machine that has the GPU, with its driver up to date",
    )
