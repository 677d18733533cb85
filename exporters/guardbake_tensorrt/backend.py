"""The engine builder behind an import guard: `tensorrt_rtx` and `tensorrt` have one Python API."""

from __future__ import annotations

import functools
import importlib
from dataclasses import dataclass
from typing import Any, Final, Literal

from guardbake.errors import EnvironmentFault, UsageError

BackendName = Literal["rtx", "tensorrt"]

_SOURCES: Final[dict[str, tuple[str, str]]] = {
    "rtx": (
        "tensorrt_rtx",
        "run `pip install tensorrt-rtx`: engines for RTX GPUs (SM75 to SM121), compiled on any "
        "x86-64 machine, no GPU needed",
    ),
    "tensorrt": (
        "tensorrt",
        "run `pip install tensorrt` (its libraries come from NVIDIA's own package index): engines "
        "for Jetson and data-centre GPUs, compiled on the machine that has the GPU",
    ),
}


class MessageLog:
    """What the library said, warnings and worse, in order, since the last `drain`."""

    def __init__(self) -> None:
        self._messages: list[tuple[str, str]] = []

    def add(self, severity: str, text: str) -> None:
        self._messages.append((severity, text))

    def drain(self) -> tuple[tuple[str, str], ...]:
        """(severity, text) pairs, WARNING, ERROR or INTERNAL_ERROR; empties the log."""
        taken, self._messages = tuple(self._messages), []
        return taken


@dataclass(frozen=True)
class Backend:
    """One loaded library. `module` is typed Any because the library ships no type stubs."""

    name: BackendName
    module: Any
    version: str
    logger: Any
    log: MessageLog

    def __str__(self) -> str:
        return f"{self.module.__name__} {self.version}"


def _logger_into(module: Any, log: MessageLog) -> Any:
    class Collector(module.ILogger):  # type: ignore[misc]  # the library has no stubs
        def __init__(self) -> None:
            module.ILogger.__init__(self)

        def log(self, severity: Any, text: str) -> None:
            if severity <= module.ILogger.Severity.WARNING:
                log.add(str(severity).rpartition(".")[2], text)

    return Collector()


@functools.cache
def load_backend(name: str) -> Backend:
    """Import the library of `name`, "rtx" or "tensorrt".

    Cached, because the library keeps the first logger of the process and ignores every later one:
    with one logger per build the errors of the second build would land in the first one's log.
    Raises UsageError for another name, EnvironmentFault when the library cannot be imported.
    """
    if name not in _SOURCES:
        raise UsageError(
            found=f"engine backend {name!r}",
            expected=" or ".join(repr(known) for known in _SOURCES),
            where="the choice of engine backend",
            remedy="name one of these",
        )
    module_name, remedy = _SOURCES[name]
    try:
        module: Any = importlib.import_module(module_name)
    except (ImportError, OSError) as error:
        raise EnvironmentFault(
            found=f"no usable Python package {module_name!r} ({error})",
            expected="an installed engine builder",
            where=f"engine backend {name!r}",
            remedy=remedy,
        ) from error
    log = MessageLog()
    backend_name: BackendName = "rtx" if name == "rtx" else "tensorrt"
    return Backend(backend_name, module, str(module.__version__), _logger_into(module, log), log)
