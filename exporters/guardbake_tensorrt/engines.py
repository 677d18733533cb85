"""The engine builders that guardbake finds by entry point, group `guardbake.engines`."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

from guardbake.bundle.publish import copy_file
from guardbake.plugins import EngineTask

from guardbake_tensorrt.backend import BackendName, load_backend
from guardbake_tensorrt.build import build_engine, check_graph, data_files
from guardbake_tensorrt.capability import require_capabilities, resolve_capabilities
from guardbake_tensorrt.command import command_line
from guardbake_tensorrt.lower import LoweredGraph, read_graph, write_lowered
from guardbake_tensorrt.sizes import profile_for


class RtxEngines:
    """Engines for RTX GPUs, compiled on any machine."""

    backend: ClassVar[BackendName] = "rtx"
    package: ClassVar[str] = "tensorrt_rtx"

    def missing(self) -> str | None:
        """See `guardbake.plugins.EngineBuilder`."""
        if importlib.util.find_spec(self.package) is None:
            return f"the package {self.package} is not installed"
        return None

    def build(
        self, task: EngineTask, folder: Path, progress: Callable[[str, int, int], None]
    ) -> None:
        """See `guardbake.plugins.EngineBuilder`."""
        engine = folder / f"{task.name}.engine"
        record = build_engine(
            task.graph,
            engine,
            backend=load_backend(self.backend),
            capabilities=task.capabilities,
            profile=profile_for(read_graph(task.graph), task.sizes, task.capacity is None),
            guard_nodes=task.nodes,
            guard_digest=task.guard,
            cache="growing" if task.capacity is None else "static",
            capacity=task.capacity,
            trunk=task.number,
            progress=progress,
        )
        engine.with_name(f"{engine.name}.json").write_text(record.to_json(), encoding="utf-8")

    def prepare(self, task: EngineTask, folder: Path) -> str:
        """See `guardbake.plugins.EngineBuilder`."""
        backend = load_backend(self.backend)
        names = resolve_capabilities(task.capabilities)
        require_capabilities(backend, names)
        model = read_graph(task.graph)
        profile = profile_for(model, task.sizes, task.capacity is None)
        checked = check_graph(
            model,
            task.graph,
            backend,
            task.nodes,
            "logits",
            cache="growing" if task.capacity is None else "static",
            capacity=task.capacity,
            trunk=task.number,
        )
        target = folder / f"{task.name}.onnx"
        target.parent.mkdir(parents=True, exist_ok=True)
        _write(checked.lowered, target)
        return command_line(backend, checked.parsed.network, Path(target.name), names, profile)


def _write(lowered: LoweredGraph, target: Path) -> None:
    """The graph, and its weights beside it: as they are unless lowering has cast them."""
    if lowered.trunk != "float32":
        write_lowered(lowered, target)
        return
    target.write_bytes(lowered.serialized)
    for name, path in data_files(lowered.model).items():
        if not target.with_name(name).exists():  # two graphs may share their weights
            copy_file(path, target.with_name(name))


class TensorRtEngines(RtxEngines):
    """Engines for data-centre and Jetson GPUs, compiled on a machine that has one."""

    backend = "tensorrt"
    package = "tensorrt"
