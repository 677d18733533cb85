"""Compile a guarded decoder ahead of time: lint, parse, prove the guard, build, write, record."""

from __future__ import annotations

import hashlib
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from guardbake.errors import EnvironmentFault, GuardbakeError, ResourceFault, UnsupportedError

from guardbake_tensorrt.backend import Backend
from guardbake_tensorrt.capability import refuse_bfloat16_on_turing, require_capabilities
from guardbake_tensorrt.lint import findings_in_source, require_clean
from guardbake_tensorrt.lint_network import ignored_inputs
from guardbake_tensorrt.lower import LoweredGraph, external_tensors, lower_graph, read_graph
from guardbake_tensorrt.network import ParsedNetwork, distinct, parse_network
from guardbake_tensorrt.presence import prove_in_graph, prove_in_network
from guardbake_tensorrt.profile import EngineProfile
from guardbake_tensorrt.record import STATUS, EngineRecord, GuardLayers

Progress = Callable[[str, int, int], None]
"""Called with (phase, steps done, steps in all) while the builder works."""

# TF32 off: with it a float32 MatMul is 1e-3 exact instead of 1e-6, and the certificate is about
# float32. STRICT_NANS on: a score that is not a number must open the gate, so NaN has to survive.
_SETTINGS: Final = (("TF32", False), ("STRICT_NANS", True))


def build_engine(
    onnx_path: Path,
    out_path: Path,
    *,
    backend: Backend,
    capabilities: Sequence[str] = ("SM89", "SM120"),
    profile: EngineProfile,
    guard_nodes: Sequence[str],
    output: str = "logits",
    progress: Progress | None = None,
) -> EngineRecord:
    """Compile `onnx_path` (never written) to `out_path`, which appears complete or not at all.

    guard_nodes: the names of the guard's nodes; each must be in the graph and in the network, with
    a path to `output`. Empty for a graph that carries no guard, e.g. a vision tower.
    Raises UsageError, MalformedError, IntegrityError about the inputs, UnsupportedError about the
    graph, SiteError about the guard, EnvironmentFault or ResourceFault about the machine.
    """
    started = time.monotonic()
    targets = require_capabilities(backend, capabilities)
    checked = _check(onnx_path, backend, guard_nodes, output)
    refuse_bfloat16_on_turing(backend, checked.parsed.network, capabilities)
    config = _configure(backend, checked.parsed, targets, profile)
    engine = _compile(backend, checked.parsed, config, progress, onnx_path)
    messages = [text for _, text in backend.log.drain()]
    return EngineRecord(
        backend=backend.name,
        version=backend.version,
        status=STATUS,
        capabilities=tuple(capabilities),
        profile=profile,
        onnx_sha256=_sha256(onnx_path),
        data_sha256=_data_digests(checked.lowered),
        engine_sha256=write_atomically(out_path, memoryview(engine)),
        engine_bytes=engine.nbytes,
        guard=checked.guard,
        settings=tuple((name, str(value)) for name, value in _SETTINGS),
        seconds=round(time.monotonic() - started, 3),
        warnings=distinct((*checked.parsed.warnings, *messages)),
    )


@dataclass(frozen=True)
class _Checked:
    """A graph fit to be compiled, with its guard found in the network."""

    lowered: LoweredGraph
    parsed: ParsedNetwork
    guard: tuple[GuardLayers, ...]


def _check(onnx_path: Path, backend: Backend, guard_nodes: Sequence[str], output: str) -> _Checked:
    where = str(onnx_path)
    model = read_graph(onnx_path)
    prove_in_graph(model, guard_nodes, where=where, output=output)
    require_clean(findings_in_source(model), onnx_path)
    lowered = lower_graph(onnx_path, model)
    parsed = parse_network(backend, lowered)
    require_clean(tuple(ignored_inputs(lowered.model, parsed.network)), onnx_path)
    layers = prove_in_network(parsed.network, guard_nodes, where=where, output=output)
    guard = tuple(GuardLayers(node, names) for node, names in layers.items())
    return _Checked(lowered, parsed, guard)


def _configure(
    backend: Backend, parsed: ParsedNetwork, targets: Sequence[Any], profile: EngineProfile
) -> Any:
    config = parsed.builder.create_builder_config()
    if targets:
        config.num_compute_capabilities = len(targets)
    for index, target in enumerate(targets):
        config.set_compute_capability(target, index)
    for name, value in _SETTINGS:
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


def _compile(
    backend: Backend, parsed: ParsedNetwork, config: Any, progress: Progress | None, where: Path
) -> Any:
    interrupts: list[KeyboardInterrupt] = []
    if progress is not None and hasattr(backend.module, "IProgressMonitor"):
        monitor = _monitor(backend.module, progress, interrupts)
        config.progress_monitor = monitor
    engine = parsed.builder.build_serialized_network(parsed.network, config)
    if interrupts:
        raise interrupts[0]
    if engine is None:
        messages = [text for severity, text in backend.log.drain() if severity != "WARNING"]
        raise _build_failure(" ".join(messages) or "the builder gave no reason", where)
    return engine


def _build_failure(reason: str, where: Path) -> GuardbakeError:
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


def write_atomically(path: Path, content: memoryview) -> str:
    """Write next to `path`, then rename over it; returns the SHA-256 of the content.

    Raises ResourceFault when the disk refuses; nothing is left behind then.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            dir=path.parent, prefix=f".{path.name}.", delete=False
        ) as file:
            temporary = Path(file.name)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    except OSError as error:
        raise ResourceFault(
            found=f"a failed write ({error})",
            expected=f"{content.nbytes} bytes of free disk",
            where=str(path),
            remedy="free some space and build again",
        ) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
    return hashlib.sha256(content).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _data_digests(lowered: LoweredGraph) -> tuple[tuple[str, str], ...]:
    paths = (Path(tensor.path) for tensor in external_tensors(lowered.model))
    files = {path.name: path for path in paths}
    return tuple((name, _sha256(files[name])) for name in sorted(files))
