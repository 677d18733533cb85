"""The engine builders that guardbake finds by entry point, group `guardbake.engines`."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import ClassVar

from guardbake_tensorrt.backend import BackendName, load_backend
from guardbake_tensorrt.build import build_engine
from guardbake_tensorrt.profile import EngineProfile

# Prompts up to 512 tokens on a cache of up to 1024, in one profile with decoding.
PROFILE = EngineProfile(batch=(1, 1, 4), seq=(1, 64, 512), past=(0, 256, 1024))


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
        self,
        decoder: Path,
        folder: Path,
        capabilities: Sequence[str],
        guard_nodes: Sequence[str],
        progress: Callable[[str, int, int], None],
    ) -> None:
        """See `guardbake.plugins.EngineBuilder`."""
        record = build_engine(
            decoder,
            folder / "decoder.engine",
            backend=load_backend(self.backend),
            capabilities=tuple(capabilities),
            profile=PROFILE,
            guard_nodes=guard_nodes,
            progress=progress,
        )
        (folder / "decoder.engine.json").write_text(record.to_json(), encoding="utf-8")


class TensorRtEngines(RtxEngines):
    """Engines for data-centre and Jetson GPUs, compiled on a machine that has one."""

    backend = "tensorrt"
    package = "tensorrt"
