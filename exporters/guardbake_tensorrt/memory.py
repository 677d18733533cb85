"""Whether the machine has the memory that a build takes, asked before it begins.

Measured with TensorRT-RTX 1.7.1 (weights to peak resident memory above the start): 513 MB of
float32 to 2.0 GB, 830 MB of float16 to 3.5 GB, 4 MB to 0.2 GB: four times the weights as they are
stored (8 bytes a parameter in half precision, 16 in float32), and what the library takes itself.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

import onnx_ir as ir

from guardbake.errors import ResourceFault

_FACTOR: Final = 4
_LIBRARY: Final = 250_000_000  # bytes


def require_memory(model: ir.Model, where: Path) -> None:
    """Raises ResourceFault if less memory is free than building an engine of `model` takes."""
    tensors = (value.const_value for value in model.graph.initializers.values())
    weights = sum(tensor.nbytes for tensor in tensors if tensor is not None)
    needed, available = _FACTOR * weights + _LIBRARY, available_memory()
    if available < needed:
        raise ResourceFault(
            found=f"{available / 1e9:.2f} GB of free memory",
            expected=f"{needed / 1e9:.2f} GB: four times the {weights / 1e9:.2f} GB of weights, "
            "and the library",
            where=str(where),
            remedy="build on a machine with more memory, or export in half precision",
        )


def available_memory(root: Path = Path("/")) -> int:
    """Bytes that this process can still take: of the machine, and of the control group (version 2)
    it runs in, with what the kernel would drop for it. root: where proc and sys are mounted.
    """
    group = _own_group(root)
    free = [_free(root), *(_free_in(path) for path in (group, *group.parents))]
    return max(0, min(each for each in free if each is not None))


def _free(root: Path) -> int:
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
    except OSError:  # no Linux: all of the memory is the best that is known
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    (line,) = (line for line in lines if line.startswith("MemAvailable:"))
    return int(line.split()[1]) * 1024


def _own_group(root: Path) -> Path:
    base = root / "sys/fs/cgroup"
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return base
    own = next((line for line in lines if line.startswith("0::")), "0::/")
    return base / own.removeprefix("0::").lstrip("/")


def _free_in(group: Path) -> int | None:
    """What the group's limit leaves; its cached files count as used, but give way."""
    try:
        limit = (group / "memory.max").read_text().strip()
        used = int((group / "memory.current").read_text())
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except OSError:
        return None
    return None if limit == "max" else int(limit) - used + int(stat["inactive_file"])
