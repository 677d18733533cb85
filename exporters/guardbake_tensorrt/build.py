"""Compile a guarded decoder ahead of time: lint, parse, prove the guard, build, write, record."""

from __future__ import annotations

import hashlib
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from guardbake.bundle.data import external_tensors
from guardbake.errors import ResourceFault

from guardbake_tensorrt.backend import Backend
from guardbake_tensorrt.capability import (
    refuse_bfloat16_on_turing,
    require_capabilities,
    resolve_capabilities,
)
from guardbake_tensorrt.compiler import SETTINGS, Progress, compile_network, configure
from guardbake_tensorrt.lint import findings_in_source, require_clean
from guardbake_tensorrt.lint_network import ignored_inputs
from guardbake_tensorrt.lower import Cache, LoweredGraph, Trunk, lower_graph, read_graph
from guardbake_tensorrt.memory import require_memory
from guardbake_tensorrt.network import ParsedNetwork, distinct, parse_network
from guardbake_tensorrt.presence import prove_in_graph, prove_in_network
from guardbake_tensorrt.profile import EngineProfile
from guardbake_tensorrt.record import STATUS, EngineRecord, GuardLayers


@dataclass(frozen=True)
class CheckedGraph:
    """A graph fit to be compiled, with its guard found in the network.

    data: the files beside the source that hold its weights, by sorted name.
    """

    data: dict[str, Path]
    lowered: LoweredGraph
    parsed: ParsedNetwork
    guard: tuple[GuardLayers, ...]


def build_engine(
    onnx_path: Path,
    out_path: Path,
    *,
    backend: Backend,
    capabilities: Sequence[str] = ("SM89", "SM120"),
    profile: EngineProfile,
    guard_nodes: Sequence[str],
    guard_digest: str | None = None,
    output: str = "logits",
    cache: Cache = "growing",
    capacity: int | None = None,
    trunk: Trunk = "float32",
    progress: Progress | None = None,
) -> EngineRecord:
    """Compile `onnx_path` (never written) to `out_path`, which appears complete or not at all.

    capabilities: GPUs by name, see `capability`. guard_nodes: the names of the guard's nodes; each
    must be in the graph and in the network, with a path to `output`. Empty for a graph that carries
    no guard, e.g. a vision tower. guard_digest: which guard that is, for the record. cache,
    capacity, trunk: see `lower_graph`; the record has them among its settings.
    Raises UsageError, MalformedError, IntegrityError about the inputs, UnsupportedError about the
    graph, SiteError about the guard, EnvironmentFault or ResourceFault about the machine.
    """
    started = time.monotonic()
    names = resolve_capabilities(capabilities)
    targets = require_capabilities(backend, names)
    model = read_graph(onnx_path)
    require_memory(model, onnx_path)
    checked = check_graph(
        model,
        onnx_path,
        backend,
        guard_nodes,
        output,
        cache=cache,
        capacity=capacity,
        trunk=trunk,
    )
    network = checked.parsed.network
    refuse_bfloat16_on_turing(backend, network, names)
    config = configure(backend, checked.parsed, targets, profile)
    engine = compile_network(backend, checked.parsed, config, progress, onnx_path)
    messages = [text for _, text in backend.log.drain()]
    return EngineRecord(
        backend=backend.name,
        version=backend.version,
        status=STATUS,
        capabilities=names,
        profile=profile,
        graph=onnx_path.name,
        onnx_sha256=_sha256(onnx_path),
        data_sha256=tuple((name, _sha256(path)) for name, path in checked.data.items()),
        engine_sha256=write_atomically(out_path, memoryview(engine)),
        engine_bytes=engine.nbytes,
        guard_digest=guard_digest,
        guard=checked.guard,
        layers=int(network.num_layers),
        settings=tuple((name, str(value)) for name, value in (*SETTINGS, *checked.lowered.choices)),
        seconds=round(time.monotonic() - started, 3),
        warnings=distinct((*checked.parsed.warnings, *messages)),
    )


def check_graph(
    model: ir.Model,
    path: Path,
    backend: Backend,
    guard_nodes: Sequence[str],
    output: str,
    *,
    cache: Cache = "growing",
    capacity: int | None = None,
    trunk: Trunk = "float32",
) -> CheckedGraph:
    """Lint, lower, parse, and prove the guard, which is everything but compiling.

    model: what `read_graph` read from `path`; it is changed. Raises as `build_engine` does.
    """
    where = str(path)
    prove_in_graph(model, guard_nodes, where=where, output=output)
    require_clean(findings_in_source(model), path)
    data = data_files(model)
    lowered = lower_graph(path, model, cache=cache, capacity=capacity, trunk=trunk)
    parsed = parse_network(backend, lowered)
    require_clean(tuple(ignored_inputs(lowered.model, parsed.network)), path)
    layers = prove_in_network(parsed.network, guard_nodes, where=where, output=output)
    guard = tuple(GuardLayers(node, names) for node, names in layers.items())
    return CheckedGraph(data, lowered, parsed, guard)


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


def data_files(model: ir.Model) -> dict[str, Path]:
    """The files with the model's weights, by sorted name."""
    paths = {Path(tensor.path) for tensor in external_tensors(model)}
    return {path.name: path for path in sorted(paths)}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
