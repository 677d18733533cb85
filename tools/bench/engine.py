"""What the guard costs when an engine is compiled: time, memory and size, guarded and unguarded.

    python tools/bench/engine.py WORK [--size 400m] [--family llava] [--number float16] [--rounds 2]

Compiles a decoder of random weights by TensorRT-RTX, each time in a process of its own, guarded and
unguarded in turn, for one GPU (sm89), with a static cache; nothing is executed. Rows: seconds of
wall and of processor time, peak resident memory, bytes of the engine, layers of the network. Below
them the ratios, of the least of each kind, and how many layers each guard node became. Wall depends
on what else the machine does; processor time much less.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

CAPACITY = 1024
KINDS = ("unguarded", "guarded")


@dataclass(frozen=True)
class Row:
    """memory in GB, engine in bytes."""

    kind: str
    wall: float
    user: float
    memory: float
    engine: int
    layers: int
    guard: dict[str, int]


def measure(work: Path, kind: str) -> Row:
    """Compile once; this process imports nothing heavy, and so does not count into the peak."""
    command = [sys.executable, str(Path(__file__).resolve()), str(work), "--build", kind]
    started = time.monotonic()
    with (work / f"{kind}.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        _, status, used = os.wait4(process.pid, 0)
    wall = time.monotonic() - started
    if status:
        sys.exit(f"exit {os.waitstatus_to_exitcode(status)}, see {work / f'{kind}.log'}")
    record = json.loads((work / f"{kind}.engine.json").read_text())
    (work / f"{kind}.engine").unlink()
    guard = {each["node"]: len(each["layers"]) for each in record["guard"]}
    peak = used.ru_maxrss / 1e6
    return Row(kind, wall, used.ru_utime, peak, record["engine_bytes"], record["layers"], guard)


def make(work: Path, family: str, size: str, number: str) -> None:
    from random_decoders import random_decoders

    made = random_decoders(family, size, number, work, shared=False)  # type: ignore[arg-type]
    said = {"nodes": made.nodes, "guard": made.spec.digest, "parameters": made.parameters}
    (work / "made.json").write_text(json.dumps(said))


def build(work: Path, kind: str) -> None:
    from guardbake.plugins import EngineSizes, EngineTask

    from guardbake_tensorrt.engines import RtxEngines

    made = json.loads((work / "made.json").read_text())
    guarded = kind == "guarded"
    task = EngineTask(
        work / f"{kind}.onnx",
        kind,
        ("sm89",),
        EngineSizes(batch=(1, 1, 4), sequence=(1, 256, 512), past=(0, 512, CAPACITY - 1)),
        made["guard"] if guarded else None,
        tuple(made["nodes"]) if guarded else (),
        capacity=CAPACITY,
    )
    RtxEngines().build(task, work, lambda *_: None)


def ratios(rows: list[Row]) -> dict[str, float]:
    """Guarded / unguarded, of the least of each kind: what the machine did besides only adds."""
    least = {
        name: {kind: min(asdict(row)[name] for row in rows if row.kind == kind) for kind in KINDS}
        for name in ("wall", "user", "memory", "engine", "layers")
    }
    return {name: each["guarded"] / each["unguarded"] for name, each in least.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("--size", default="400m")
    parser.add_argument("--family", choices=("llava", "qwen2_5_vl"), default="llava")
    parser.add_argument("--number", default="float16")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--make", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--build", choices=KINDS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    work = arguments.work
    if arguments.make:
        return make(work, arguments.family, arguments.size, arguments.number)
    if arguments.build:
        return build(work, arguments.build)
    work.mkdir(parents=True)
    given = ["--family", arguments.family, "--size", arguments.size]
    given += ["--number", arguments.number]
    subprocess.run([sys.executable, __file__, str(work), "--make", *given], check=True)
    rows: list[Row] = []
    for turn in range(arguments.rounds):
        for kind in KINDS[:: 1 if turn % 2 == 0 else -1]:
            rows.append(measure(work, kind))
            print(f"{kind}: {rows[-1].wall:.1f} s", file=sys.stderr, flush=True)
    report(arguments, rows, json.loads((work / "made.json").read_text()))
    shutil.rmtree(work)


def report(arguments: argparse.Namespace, rows: list[Row], made: dict[str, Any]) -> None:
    """Print the table, and write --json."""
    found = ratios(rows)
    print(f"{arguments.family}, {made['parameters'] / 1e6:.0f} M parameters, {arguments.number},")
    print(f"sm89, capacity {CAPACITY}; {platform.machine()}, {os.cpu_count()} cores\n")
    print("| decoder | wall s | user s | peak GB | engine MB | network layers |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        figures = f"{row.wall:.1f} | {row.user:.1f} | {row.memory:.2f} | {row.engine / 1e6:.2f}"
        print(f"| {row.kind} | {figures} | {row.layers} |")
    print("\nguarded / unguarded: " + ", ".join(f"{n} {r:.4f}" for n, r in found.items()))
    guard = next(row.guard for row in rows if row.kind == "guarded")
    print("\n| guard node | network layers |\n|---|---|")
    for node, layers in guard.items():
        print(f"| {node} | {layers} |")
    if arguments.json:
        values = {"rows": [asdict(row) for row in rows], "ratios": found, **made}
        arguments.json.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
