"""The GPUs an engine is compiled for, by the names that people use for them.

Source of the table: NVIDIA, "CUDA GPU Compute Capability" (developer.nvidia.com/cuda-gpus). What a
backend compiles for, its own `ComputeCapability` says.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import MappingProxyType
from typing import Any, Final

from guardbake.errors import UnsupportedError, UsageError

from guardbake_tensorrt.backend import Backend

CURRENT: Final = "CURRENT"

NAMES: Final = MappingProxyType({
    "turing": ("SM75",),
    "rtx-20": ("SM75",),
    "t4": ("SM75",),
    "ampere": ("SM80", "SM86"),
    "a100": ("SM80",),
    "rtx-30": ("SM86",),
    "a10": ("SM86",),
    "jetson-orin": ("SM87",),
    "ada": ("SM89",),
    "rtx-40": ("SM89",),
    "l4": ("SM89",),
    "l40s": ("SM89",),
    "hopper": ("SM90",),
    "h100": ("SM90",),
    "h200": ("SM90",),
    "b200": ("SM100",),
    "b300": ("SM103",),
    "jetson-thor": ("SM110",),
    "blackwell": ("SM120", "SM121"),
    "rtx-50": ("SM120",),
    "dgx-spark": ("SM121",),
})  # fmt: skip
"""Capabilities by name. A generation stands for its RTX GPUs; data-centre and Jetson GPUs of the
same generation have names of their own, because engines for them need TensorRT."""

_NO_RTX: Final = {
    "SM87": "Jetson Orin",
    "SM90": "H100 and H200",
    "SM100": "B200",
    "SM103": "B300",
    "SM110": "Jetson Thor",
}


def resolve_capabilities(names: Sequence[str]) -> tuple[str, ...]:
    """ "rtx-40", "ada" or "sm89" as "SM89": what is named, in order, each once, in any case.

    Raises UsageError for no name, a name twice, or one that is none.
    """
    lower = [name.lower() for name in names]
    if not names or len(set(lower)) != len(lower):
        raise UsageError(
            found=f"compute capabilities {list(names)}",
            expected="one or more, each once",
            where="the engine build",
            remedy="name the GPUs, e.g. rtx-40 and rtx-50",
        )
    return tuple(dict.fromkeys(each for name in lower for each in _resolve(name)))


def _resolve(name: str) -> tuple[str, ...]:
    capabilities = {each for known in NAMES.values() for each in known}
    if name.upper() in (*capabilities, CURRENT):
        return (name.upper(),)
    if name not in NAMES:
        by_number = sorted(capabilities, key=lambda each: int(each[2:]))
        raise UsageError(
            found=f"compute capability {name!r}",
            expected=f"one of {', '.join((*NAMES, *(each.lower() for each in by_number)))}, or "
            "current for the GPU at hand",
            where="the choice of GPUs",
            remedy="correct the name, or find the GPU's at developer.nvidia.com/cuda-gpus",
        )
    return NAMES[name]


def require_capabilities(backend: Backend, names: Sequence[str]) -> tuple[Any, ...]:
    """The library's constant for each of the resolved names, in order; none for "CURRENT", the GPU
    at hand, which only the backend "tensorrt" takes: TensorRT-RTX is used where there is none.

    Raises UnsupportedError for a GPU that the backend does not compile for, UsageError for
    "CURRENT" where or beside what it cannot be.
    """
    if backend.name == "tensorrt" and tuple(names) == (CURRENT,):
        return ()
    listed = getattr(backend.module, "ComputeCapability", None)
    if listed is None:
        raise UnsupportedError(
            found=f"compute capabilities {list(names)}",
            expected=f"{CURRENT.lower()}: this library compiles for the GPU of its own machine",
            where=f"the engine build with {backend}",
            remedy=f"name {CURRENT.lower()}, on the machine that will run the engine",
        )
    known = {name: value for name, value in listed.__members__.items() if name.startswith("SM")}
    return tuple(_require_capability(backend, name, known) for name in names)


def _require_capability(backend: Backend, name: str, known: dict[str, Any]) -> Any:
    if name in known:
        return known[name]
    if backend.name == "rtx" and name in _NO_RTX:
        raise UnsupportedError(
            found=f"{name} ({_NO_RTX[name]})",
            expected="an RTX GPU: " + ", ".join(known),
            where=f"{backend} compiles for RTX GPUs only, not for data-centre or Jetson ones",
            remedy="use the backend tensorrt on a machine that has such a GPU",
        )
    raise UsageError(
        found=f"compute capability {name!r}",
        expected="one of " + ", ".join(known),
        where=f"the engine build with {backend}",
        remedy="name a GPU that it compiles for",
    )


def refuse_bfloat16_on_turing(backend: Backend, network: Any, names: Sequence[str]) -> None:
    """Turing (SM75) has no bfloat16; raises UnsupportedError when the network needs both."""
    if "SM75" not in names:
        return
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        for output in range(layer.num_outputs):
            if layer.get_output(output).dtype == backend.module.DataType.BF16:
                raise UnsupportedError(
                    found=f"bfloat16 in layer {layer.name!r} and SM75 among the targets",
                    expected="GPUs that have bfloat16: SM80 and newer",
                    where="the engine build",
                    remedy="leave SM75 out, or export in float16 or float32",
                )
