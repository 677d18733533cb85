"""The GPUs an engine is compiled for, named by compute capability."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from guardbake.errors import UnsupportedError, UsageError

from guardbake_tensorrt.backend import Backend

CURRENT: Final = "CURRENT"

_NO_RTX: Final = {
    "SM87": "Jetson Orin",
    "SM90": "H100 and H200",
    "SM100": "B200",
    "SM103": "B300",
    "SM110": "Jetson Thor",
}


def require_capabilities(backend: Backend, names: Sequence[str]) -> tuple[Any, ...]:
    """The library's constant for each name, in order; none for "CURRENT", the GPU at hand, which
    only the backend "tensorrt" takes: TensorRT-RTX is used where there is none.

    Raises UsageError for no name, a name twice, or one that is none; UnsupportedError for a GPU
    that the backend does not compile for.
    """
    if not names or len(set(names)) != len(names):
        raise UsageError(
            found=f"compute capabilities {list(names)}",
            expected="one or more, each once",
            where="the engine build",
            remedy='name the GPUs, e.g. "SM89" (RTX 40) and "SM120" (RTX 50)',
        )
    if backend.name == "tensorrt" and tuple(names) == (CURRENT,):
        return ()
    listed = getattr(backend.module, "ComputeCapability", None)
    if listed is None:
        raise UnsupportedError(
            found=f"compute capabilities {list(names)}",
            expected=f"{CURRENT!r}: this library compiles for the GPU of its own machine",
            where=f"the engine build with {backend}",
            remedy=f"give the capabilities ({CURRENT!r},) on the machine that will run the engine",
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
            remedy='use the backend "tensorrt" on a machine that has such a GPU',
        )
    raise UsageError(
        found=f"compute capability {name!r}",
        expected="one of " + ", ".join(known),
        where=f"the engine build with {backend}",
        remedy="correct the name",
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
