"""What the guard costs and what the ONNX rendering gains, measured side by side in one process.

    python tools/bench/run.py build/demo [--checkpoint FOLDER] [--rounds 5] [--json results.json]

Rows: guarded / unguarded decoder in onnxruntime (wall, interleaved, with an unguarded / unguarded
control that shows the noise); the guard's share of kernel time in onnxruntime's own profile; new
tokens a second of the ONNX model against the hooked PyTorch reference, same prompts, same threads.
The unguarded graph is the bundle's export stage, found in the workspace beside it; so is the
checkpoint of a recipe that names a delta. Another recipe's checkpoint is to be named.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch

from guardbake.artifact import load_guard
from guardbake.bundle.manifest import GUARD
from guardbake.check.golden import load_golden
from guardbake.passes.insert import IMAGES_IN, MEMORY_IN, STATE_IN
from guardbake.plugins import Runner
from guardbake.vlm.load import load_vlm
from guardbake.vlm.runner import TorchRunner

from guardbake_onnx.description import read_description
from guardbake_onnx.runner import OnnxRunner

PREFILL, PAST = 256, 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    workspace = arguments.bundle.parent / ".guardbake"
    unguarded = _latest(workspace, "export") / "onnx"
    checkpoint = arguments.checkpoint or _latest(workspace, "model") / "checkpoint"
    results: dict[str, Any] = {
        "machine": f"{platform.machine()}, {arguments.threads} threads",
        "onnxruntime": onnxruntime.__version__,
        "torch": torch.__version__,
        "overhead": _overhead(arguments.bundle, unguarded, arguments.rounds, arguments.threads),
        "profile": _profile(arguments.bundle, arguments.threads),
        "speed": _speed(arguments.bundle, checkpoint, arguments.rounds, arguments.threads),
    }
    print(json.dumps(results, indent=2))
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def _latest(workspace: Path, stage: str) -> Path:
    """The stage's newest folder."""
    return max(workspace.glob(f"{stage}-*"), key=lambda path: path.stat().st_mtime)


def _session(folder: Path, threads: int, profile: str | None) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = profile
    return onnxruntime.InferenceSession(
        folder / "decoder.onnx", options, providers=["CPUExecutionProvider"]
    )


def _feeds(
    session: onnxruntime.InferenceSession, bundle: Path, tokens: int, past: int
) -> dict[str, Any]:
    """One sequence of `tokens` new tokens after `past` cached ones; open, so that all edits run."""
    description = read_description(bundle)
    rng = np.random.default_rng(0)
    shape = (1, description.kv_heads, past, description.head_dim)
    positions = np.arange(past, past + tokens)[None]
    if description.position == "mrope":
        positions = np.repeat(positions[None], 3, axis=0)
    feeds: dict[str, Any] = {
        "inputs_embeds": rng.standard_normal((1, tokens, description.hidden)).astype(np.float32),
        "attention_mask": np.ones((1, past + tokens), np.int64),
        "position_ids": positions,
    }
    if description.deepstack:
        levels = (description.deepstack, 1, tokens, description.hidden)
        feeds["deepstack_embeds"] = rng.standard_normal(levels).astype(np.float32)
    if description.mask != "causal":
        feeds["mutual_mask"] = np.zeros((1, tokens), bool)
    for layer in range(description.layers):
        for kind in ("key", "value"):
            cache = rng.standard_normal(shape).astype(np.float32)
            feeds[f"past_key_values.{layer}.{kind}"] = cache
    guard = {
        STATE_IN: np.array([2 ** len(load_guard(bundle / GUARD).sensors)], np.int64),
        MEMORY_IN: np.zeros((1, 3), np.float32),
        IMAGES_IN: np.ones((1, tokens), np.bool_),
    }
    wanted = {node.name for node in session.get_inputs()}
    return feeds | {name: value for name, value in guard.items() if name in wanted}


def _overhead(bundle: Path, unguarded: Path, rounds: int, threads: int) -> dict[str, Any]:
    """Ratios of median wall times; the three sessions take turns in rotating order."""
    arms = {"guarded": bundle, "unguarded": unguarded, "control": unguarded}
    sessions = {name: _session(folder, threads, None) for name, folder in arms.items()}
    result = {}
    for case, tokens, past in (("prefill", PREFILL, 0), ("decode", 1, PAST)):
        feeds = {name: _feeds(sessions[name], bundle, tokens, past) for name in arms}
        times: dict[str, list[float]] = {name: [] for name in arms}
        names = list(arms)
        repeats = rounds * (1 if tokens > 1 else 20)
        for turn in range(repeats + 1):
            for name in names[turn % 3 :] + names[: turn % 3]:
                started = time.perf_counter()
                sessions[name].run(["logits"], feeds[name])
                if turn:  # the first turn warms up
                    times[name].append(time.perf_counter() - started)
        median = {name: statistics.median(values) for name, values in times.items()}
        result[case] = {
            "guarded / unguarded": median["guarded"] / median["unguarded"],
            "control / unguarded": median["control"] / median["unguarded"],
            "unguarded ms": median["unguarded"] * 1e3,
            "rounds": repeats,
        }
    return result


def _profile(bundle: Path, threads: int) -> dict[str, Any]:
    """The guard's share of kernel time, by the names of its nodes."""
    result = {}
    for case, tokens, past in (("prefill", PREFILL, 0), ("decode", 1, PAST)):
        with tempfile.TemporaryDirectory() as folder:
            session = _session(bundle, threads, str(Path(folder) / "profile"))
            feeds = _feeds(session, bundle, tokens, past)
            for _ in range(10):
                session.run(["logits"], feeds)
            events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
        kernels = [e for e in events if e["name"].endswith("_kernel_time")]
        ours = [e for e in kernels if "guardbake" in e["name"].lower()]
        result[case] = {
            "guard share of kernel time": sum(e["dur"] for e in ours)
            / sum(e["dur"] for e in kernels),
            "guard kernels": len({e["name"] for e in ours}),
            "kernels": len({e["name"] for e in kernels}),
        }
    return result


def _speed(bundle: Path, checkpoint: Path, rounds: int, threads: int) -> dict[str, Any]:
    """New tokens a second over the golden prompts, prefill included, tokens forced alike."""
    torch.set_num_threads(threads)
    golden = load_golden(bundle / "golden.safetensors")
    batch, truth = next(iter(golden.runs.values()))
    steps = truth.tokens.shape[1]
    spec = load_guard(bundle / GUARD)
    arms: dict[str, Runner] = {
        "onnx": OnnxRunner(bundle, threads=threads),
        "torch": TorchRunner(load_vlm(str(checkpoint)), spec),
    }
    times: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(rounds + 1):
        for name in list(arms)[:: 1 if turn % 2 else -1]:
            started = time.perf_counter()
            arms[name].run(batch, steps, truth.tokens, keep_prefill=False)
            if turn:
                times[name].append(time.perf_counter() - started)
    rate = {n: truth.tokens.size / statistics.median(values) for n, values in times.items()}
    return {
        "onnx tokens/s": rate["onnx"],
        "hooked torch tokens/s": rate["torch"],
        "onnx / torch": rate["onnx"] / rate["torch"],
        "prompts": int(batch.input_ids.shape[0]),
        "new tokens each": int(steps),
    }


if __name__ == "__main__":
    main()
