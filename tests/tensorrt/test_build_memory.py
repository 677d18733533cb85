"""How much memory there is: of the machine, and of the control groups a process runs in."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
import pytest

from guardbake.errors import ResourceFault

from guardbake_tensorrt import memory
from guardbake_tensorrt.memory import available_memory, require_memory


def _machine(root: Path, available: int, groups: dict[str, tuple[str, int, int]]) -> Path:
    """groups: (limit, used, of that cached files) by path below the root group."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text(f"MemFree: 1 kB\nMemAvailable: {available} kB\n")
    (root / "proc/self/cgroup").write_text("1:name=systemd:/x\n0::/slice/job\n")
    for name, (limit, used, cached) in groups.items():
        group = root / "sys/fs/cgroup" / name
        group.mkdir(parents=True, exist_ok=True)
        (group / "memory.max").write_text(f"{limit}\n")
        (group / "memory.current").write_text(f"{used}\n")
        (group / "memory.stat").write_text(f"anon 1\ninactive_file {cached}\n")
    return root


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        ({}, 8192),
        ({"slice/job": ("max", 9000, 0)}, 8192),
        ({"slice/job": ("5000", 2000, 300)}, 3300),
        ({"slice": ("4000", 2500, 0), "slice/job": ("5000", 2000, 0)}, 1500),
        ({"slice/job": ("5000", 6000, 0)}, 0),
        ({"other": ("10", 10, 0)}, 8192),
    ],
)
def test_the_tightest_limit_counts(
    groups: dict[str, tuple[str, int, int]], expected: int, tmp_path: Path
) -> None:
    assert available_memory(_machine(tmp_path, 8, groups)) == expected


def test_without_a_proc_all_of_the_memory_is_what_is_known(tmp_path: Path) -> None:
    assert available_memory(tmp_path) >= available_memory()


def test_a_build_needs_four_times_its_weights(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = ir.load(plain)
    tensors = [value.const_value for value in model.graph.initializers.values()]
    needed = 4 * sum(tensor.nbytes for tensor in tensors if tensor is not None) + 250_000_000
    monkeypatch.setattr(memory, "available_memory", lambda: needed)
    require_memory(model, plain)
    monkeypatch.setattr(memory, "available_memory", lambda: needed - 1)
    with pytest.raises(ResourceFault, match="four times") as caught:
        require_memory(model, plain)
    assert caught.value.exit_code == 8
