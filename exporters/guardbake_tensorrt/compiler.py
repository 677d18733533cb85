"""A parsed network into an engine: the builder's settings, its progress, the ways it gives up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from guardbake.errors import EnvironmentFault, GuardbakeError, ResourceFault, UnsupportedError

from guardbake_tensorrt.backend import Backend
from guardbake_tensorrt.network import ParsedNetwork
from guardbake_tensorrt.profile import EngineProfile

Progress = Callable[[str, int, int], None]
"""Called with (phase, steps done, steps in all) while the builder works."""

# TF32 off: with it a float32 MatMul is 1e-3 exact instead of 1e-6, and the certificate is about
# float32. STRICT_NANS on: a score that is not a number must open the gate, so NaN has to survive.
SETTINGS: Final = (("TF32", False), ("STRICT_NANS", True))


def configure(
    backend: Backend, parsed: ParsedNetwork, targets: Sequence[Any], profile: EngineProfile
) -> Any:
    """The builder's configuration: GPUs, SETTINGS and an optimisation profile for each phase."""
    config = parsed.builder.create_builder_config()
    if targets:
        config.num_compute_capabilities = len(targets)
    for index, target in enumerate(targets):
        config.set_compute_capability(target, index)
    for name, value in SETTINGS:
        flag = backend.module.BuilderFlag.__members__[name]
        (config.set_flag if value else config.clear_flag)(flag)
    inputs = [parsed.network.get_input(i) for i in range(parsed.network.num_inputs)]
    dynamic = [each for each in inputs if -1 in tuple(each.shape)]
    for phase in profile.phases if dynamic else ():
        ranges = parsed.builder.create_optimization_profile()
        for each in dynamic:
            ranges.set_shape(each.name, *profile.shapes(phase, each.name, tuple(each.shape)))
        config.add_optimization_profile(ranges)
    return config


def compile_network(
    backend: Backend, parsed: ParsedNetwork, config: Any, progress: Progress | None, where: Path
) -> Any:
    """The serialised engine, a buffer. Raises what `build_failure` makes of the builder's log."""
    interrupts: list[KeyboardInterrupt] = []
    if progress is not None and hasattr(backend.module, "IProgressMonitor"):
        monitor = _monitor(backend.module, progress, interrupts)
        config.progress_monitor = monitor
    engine = parsed.builder.build_serialized_network(parsed.network, config)
    if interrupts:
        raise interrupts[0]
    if engine is None:
        messages = [text for severity, text in backend.log.drain() if severity != "WARNING"]
        raise build_failure(" ".join(messages) or "the builder gave no reason", where)
    return engine


def _monitor(module: Any, progress: Progress, interrupts: list[KeyboardInterrupt]) -> Any:
    class Monitor(module.IProgressMonitor):  # type: ignore[misc]  # the library has no stubs
        def __init__(self) -> None:
            module.IProgressMonitor.__init__(self)
            self._steps: dict[str, int] = {}

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            self._steps[phase] = steps

        def step_complete(self, phase: str, step: int) -> bool:
            """False stops the build; an exception must not cross the library's own frames."""
            try:
                progress(phase, step + 1, self._steps[phase])
            except KeyboardInterrupt as interrupt:
                interrupts.append(interrupt)
            return not interrupts

        def phase_finish(self, phase: str) -> None:
            self._steps.pop(phase, None)

    return Monitor()


def build_failure(reason: str, where: Path) -> GuardbakeError:
    """The builder has one way to fail; what it logged tells whose fault it is."""
    lower = reason.lower()
    found = f"no engine: {reason.strip()}"
    if "out of memory" in lower or "bad_alloc" in lower or "outofmemory" in lower:
        return ResourceFault(
            found=found,
            expected="enough memory: about four times the weights",
            where=str(where),
            remedy="build on a machine with more memory",
        )
    if "cuda" in lower or "driver" in lower or "no device" in lower:
        return EnvironmentFault(
            found=found,
            expected="a build that needs no device, or a device",
            where=str(where),
            remedy="name compute capabilities, or build on the machine that has the GPU",
        )
    return UnsupportedError(
        found=found,
        expected="a network this builder has kernels for",
        where=str(where),
        remedy="change the operator that it names, or narrow the profile",
    )
