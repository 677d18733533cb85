"""Every check that wants a GPU, by one command, on whatever machine this is.

    python tools/bench/gpu.py OUT [--size 7b] [--bundle DIR [--engines DIR]] [--only NAME ...]

Each check is a process of its own with --minutes to live; what it found goes to OUT/NAME.json when
it is done, and OUT/results.md and OUT/results.json are written anew after each. Run again, it goes
on with what is not done. What cannot be run here says why: nothing is skipped in silence.

    machine    the GPU, its driver, the libraries and what each of them says it can do
    parity-*   tiny models by onnxruntime's CUDA provider, TF32 off, against PyTorch in float64
    latency-*  guarded / unguarded decoders of --size and random weights, prefill and decode
    hooks-*    the same by the PyTorch reference, whose guard is hooks
    engine-*   an engine compiled by TensorRT-RTX, loaded here, against PyTorch in float64
    bundle-*   guardbake parity of --bundle, by the runners cuda, rtx and tensorrt

--provider cpu --size tiny runs all of it on the CPU, as a test of this script and of nothing else.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from gpu_outcome import Outcome, Status, read_outcome

FAMILIES = ("llava", "qwen2_5_vl")
RUNNERS = ("cuda", "rtx", "tensorrt")
NUMBERS = ("float32", "float16", "bfloat16")
CHECKS = (
    "machine",
    *(
        f"{kind}-{family}"
        for kind in ("parity", "latency", "hooks", "engine")
        for family in FAMILIES
    ),
    *(f"bundle-{runner}" for runner in RUNNERS),
)
NEVER = {
    "fit": "diagnose and fit at 7B shapes: they compute on the CPU; tools/bench/subspaces.py and "
    "tools/bench/trace.py time them there",
}
PACKAGES = (
    "guardbake", "torch", "transformers", "onnx", "onnx-ir", "onnxruntime", "onnxruntime-gpu",
    "tensorrt-rtx", "tensorrt", "cuda-bindings",
)  # fmt: skip


def machine() -> Outcome:
    """What is here, as the libraries themselves say."""
    import onnxruntime

    found: dict[str, Any] = {"python": platform.python_version(), "machine": platform.machine()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    found["onnxruntime providers"] = ", ".join(onnxruntime.get_available_providers())
    if shutil.which("nvidia-smi"):
        query = "--query-gpu=name,driver_version,memory.total,compute_cap"
        command = ["nvidia-smi", query, "--format=csv,noheader"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        found["GPU"] = (done.stdout or done.stderr).strip()
    else:
        found["GPU"] = "no nvidia-smi"
    return Outcome("done", "", found)


def bundle(folder: Path | None, engines: Path | None, runner: str) -> Outcome:
    """`guardbake parity`, as a user types it."""
    if folder is None:
        return Outcome("not run", "no --bundle was named")
    command = [sys.executable, "-m", "guardbake", "parity", str(folder), "--json"]
    command += ["--runner", runner]
    if engines is not None and runner != "cuda":
        command += ["--engines", str(engines)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return Outcome("done", "parity: pass", json.loads(done.stdout))
    status: Status = "not run" if done.returncode == 7 else "failed"
    return Outcome(status, f"exit {done.returncode}: {done.stderr.strip()[-1500:]}")


def one(name: str, arguments: argparse.Namespace) -> Outcome:
    """Run a check in this process. torch goes first: it brings CUDA's libraries with it."""
    import torch  # noqa: F401

    from guardbake.errors import EnvironmentFault

    kind, _, which = name.partition("-")
    numbers = arguments.number or NUMBERS
    cuda, out = arguments.provider == "cuda", arguments.out / f"{name}.json"
    with tempfile.TemporaryDirectory(dir=arguments.out) as work:
        folder = Path(work)
        try:
            if kind == "machine":
                return machine()
            if kind == "bundle":
                return bundle(arguments.bundle, arguments.engines, which)
            if kind == "parity":
                from gpu_parity import check as parity

                return parity(which, cuda, folder, numbers)  # type: ignore[arg-type]
            if kind == "engine":
                from gpu_engine import check as engine

                return engine(which, folder, numbers)  # type: ignore[arg-type]
            if kind == "hooks":
                from gpu_hooks import check as hooks

                return hooks(which, arguments.size, cuda, arguments.minutes, out)  # type: ignore[arg-type]
            from gpu_latency import check as latency

            return latency(which, arguments.size, cuda, folder, arguments.minutes, out)  # type: ignore[arg-type]
        except EnvironmentFault as error:
            return Outcome("not run", str(error))


def child(name: str, arguments: argparse.Namespace, key: dict[str, str]) -> Outcome:
    """Run a check in a process of its own, which may die without harm to the others."""
    here = Path(__file__).resolve()
    command = [sys.executable, str(here), *sys.argv[1:], "--check", name]
    started, path = time.monotonic(), arguments.out / f"{name}.json"
    path.unlink(missing_ok=True)
    log = arguments.out / f"{name}.log"
    said = ""
    with log.open("wb") as file:
        try:
            done = subprocess.run(
                command, stdout=file, stderr=file, timeout=60 * arguments.minutes, check=False
            )
            if done.returncode:
                tail = log.read_text(encoding="utf-8", errors="replace").strip()[-1500:]
                said = f"exit {done.returncode}: {tail}"
        except subprocess.TimeoutExpired:
            said = f"more than {arguments.minutes:g} minutes"
    left = read_outcome(path) or Outcome("failed")
    if said:
        left = replace(left, status="failed", said=said)
    left = replace(left, seconds=round(time.monotonic() - started, 1), key=key)
    left.write(path)
    return left


def write_results(out: Path, found: dict[str, Outcome]) -> None:
    """results.json and results.md: every check, those that nothing can run among them."""
    whole = {**found, **{name: Outcome("not run", why) for name, why in NEVER.items()}}
    text = json.dumps({name: asdict(each) for name, each in whole.items()}, indent=2)
    (out / "results.json").write_text(text + "\n", encoding="utf-8")
    lines = ["# GPU checks", "", "| check | outcome | seconds | said |", "|---|---|---|---|"]
    for name, each in whole.items():
        said = " ".join(each.said.split()).replace("|", "/")[:300]
        lines.append(f"| {name} | {each.status} | {each.seconds:g} | {said} |")
    for name, each in found.items():
        if each.figures:
            lines += ["", f"## {name}", "", "```json", json.dumps(each.figures, indent=2), "```"]
    (out / "results.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--provider", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--size", choices=("tiny", "400m", "7b"), default="7b")
    parser.add_argument("--minutes", type=float, default=9.0, help="for each check")
    parser.add_argument("--number", choices=NUMBERS, action="append", help="of parity and engines")
    parser.add_argument("--only", choices=CHECKS, action="append")
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--engines", type=Path)
    parser.add_argument("--check", choices=CHECKS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    out: Path = arguments.out
    if arguments.check:
        one(arguments.check, arguments).write(out / f"{arguments.check}.json")
        return
    out.mkdir(parents=True, exist_ok=True)
    key = {"provider": arguments.provider, "size": arguments.size, "host": platform.node()}
    key["numbers"] = ", ".join(arguments.number or NUMBERS)
    run_all(arguments, key, lambda line: print(line, flush=True))


def run_all(arguments: argparse.Namespace, key: dict[str, str], say: Callable[[str], None]) -> None:
    """In order; what is done already, on this machine and with these choices, is kept."""
    left = {name: read_outcome(arguments.out / f"{name}.json") for name in CHECKS}
    found = {name: each for name, each in left.items() if each is not None and each.key == key}
    for name in arguments.only or CHECKS:
        before = name in found and found[name].status == "done"
        each = found[name] if before else child(name, arguments, key)
        found[name] = each
        when = f"before, {each.seconds:g} s" if before else f"{each.seconds:g} s"
        say(f"{name}: {each.status}, {when}  {each.said[:200]}")
        write_results(arguments.out, {name: found[name] for name in CHECKS if name in found})
    say(f"see {arguments.out / 'results.md'}")


if __name__ == "__main__":
    main()
