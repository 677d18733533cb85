"""Guarded against unguarded latency of decoders of random weights, interleaved; used by gpu.py.

Inputs and outputs stay on the device and in their places, so that what is timed is the graph. With
CUDA graphs a decode step is one replay; where onnxruntime cannot capture it, its words are recorded
and the step is timed without. "control" is the unguarded decoder once more: what its ratio is off
by is the noise of the others'.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from gpu_outcome import Outcome
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors
from random_decoders import SHAPES, Decoders, FamilyName, random_decoders

from guardbake.plugins import Number

from guardbake_onnx.executor import GraphInput
from guardbake_onnx.provider import CPU, CUDA, Provider, open_session
from guardbake_onnx.runner import OrtExecutor

BATCHES = (1, 8)
TOKENS = {"tiny": 32, "400m": 256, "7b": 1024}  # of a prefill, and of the past of a decode step
_GRAPH_ID = "gpu_graph_id"
_NO_CAPTURE = "-1"
_OPEN = 2  # the guard's state once its gate has opened
# an arena that doubles would not leave room for two 7B decoders and eight rows
_CUDA = replace(CUDA, options=(*CUDA.options, ("arena_extend_strategy", "kSameAsRequested")))
_FAULTS = (ort_errors.Fail, ort_errors.NotImplemented, ort_errors.RuntimeException, RuntimeError)


class Arm:
    """One session with the inputs of one case, bound once; `call` runs it."""

    def __init__(
        self,
        session: onnxruntime.InferenceSession,
        inputs: dict[str, GraphInput],
        device: str,
        case: tuple[int, int, int],
        graph_id: str,
    ) -> None:
        """case: sequences, new tokens, tokens in the cache."""
        self._session = session
        self._binding = session.io_binding()
        self._options = onnxruntime.RunOptions()
        if device != CPU.device:
            self._options.add_run_config_entry(_GRAPH_ID, graph_id)
        self._kept = []
        for name, given in inputs.items():
            value = _value(name, given, *case)
            placed = onnxruntime.OrtValue.ortvalue_from_numpy(value, device, 0)
            self._binding.bind_ortvalue_input(name, placed)
            self._kept.append(placed)
        names = [value.name for value in session.get_outputs()]
        for name in names:
            self._binding.bind_output(name, device)
        free = onnxruntime.RunOptions()
        if device != CPU.device:
            free.add_run_config_entry(_GRAPH_ID, _NO_CAPTURE)
        session.run_with_iobinding(self._binding, free)
        placed_outputs = self._binding.get_outputs()
        self._binding.clear_binding_outputs()
        for name, value in zip(names, placed_outputs, strict=True):
            self._binding.bind_ortvalue_output(name, value)  # from now on always there
            self._kept.append(value)

    def call(self) -> float:
        """Seconds of wall until the device is done."""
        started = time.perf_counter()
        self._session.run_with_iobinding(self._binding, self._options)
        self._binding.synchronize_outputs()
        return time.perf_counter() - started


@functools.cache
def _random(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Any:
    rng = np.random.default_rng(0)
    return rng.standard_normal(shape, np.float32).astype(dtype)


def _value(name: str, given: GraphInput, batch: int, tokens: int, past: int) -> Any:
    """The same numbers for every input of one shape; the gate has opened, so all edits act."""
    if name == "attention_mask":
        return np.ones((batch, past + tokens), np.int64)
    if name == "position_ids":
        places = np.broadcast_to(np.arange(past, past + tokens), (batch, tokens))
        return np.array(
            np.broadcast_to(places, (3, batch, tokens)) if len(given.shape) == 3 else places
        )
    if name == "guard_state":
        return np.full(batch, _OPEN, np.int64)
    if name == "guard_image_mask":
        return np.zeros((batch, tokens), bool)
    if name == "inputs_embeds":
        return _random((batch, tokens, given.shape[2] or 0), given.dtype)
    return _random((batch, given.shape[1] or 0, past, given.shape[3] or 0), given.dtype)


def _interleaved(arms: dict[str, Arm], rounds: int, until: float) -> dict[str, Any]:
    """Medians over rounds in rotating order, the first three of them to warm up."""
    times: dict[str, list[float]] = {name: [] for name in arms}
    names = list(arms)
    for turn in range(-3, rounds):
        if turn > 4 and time.monotonic() > until:
            break
        for name in names[turn % 3 :] + names[: turn % 3]:
            seconds = arms[name].call()
            if turn >= 0:
                times[name].append(seconds)
    median = {name: statistics.median(values) for name, values in times.items()}
    return {
        "guarded / unguarded": median["guarded"] / median["unguarded"],
        "control / unguarded": median["control"] / median["unguarded"],
        "unguarded ms": median["unguarded"] * 1e3,
        "rounds": len(times["guarded"]),
    }


def _added(guarded: Any, unguarded: Any) -> dict[str, int]:
    """Operators that onnxruntime runs for the guarded graph and not for the other, by type."""
    counts = []
    for session in (guarded, unguarded):
        parts = session.get_provider_graph_assignment_info()
        counts.append(Counter(node.op_type for part in parts for node in part.get_nodes()))
    found = counts[0].copy()
    found.subtract(counts[1])
    return {kind: count for kind, count in sorted(found.items()) if count}


def _kernels(arm: Arm) -> int:
    """CUDA kernels of one call, as the profiler of PyTorch sees them: all of this process."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        arm.call()
        torch.cuda.synchronize()
    named = [event.name for event in seen.events() if "CUDA" in str(event.device_type)]
    return sum(not name.startswith(("Memcpy", "Memset")) for name in named)


def _open(
    decoders: Decoders, provider: Provider
) -> tuple[dict[str, onnxruntime.InferenceSession], dict[str, dict[str, GraphInput]], str]:
    paths = {"guarded": decoders.guarded, "unguarded": decoders.unguarded}
    sessions = {name: open_session(path, 0, provider) for name, path in paths.items()}
    inputs = {name: dict(OrtExecutor(s, provider).inputs) for name, s in sessions.items()}
    return sessions, inputs, OrtExecutor(sessions["guarded"], provider).settings


def _timed(
    decoders: Decoders, provider: Provider, size: str, until: float, say: Callable[[Any], None]
) -> None:
    """Every case; `say` is told after each, so that what was measured is kept."""
    sessions, inputs, settings = _open(decoders, provider)
    say({"settings": settings, "operators added": _added(*sessions.values())})
    long = TOKENS[size]
    cases = {f"prefill {long}": (long, 0), f"decode after {long}": (1, long)}
    for number, (case, (tokens, past)) in enumerate(cases.items()):
        for batch in BATCHES:
            capture = provider is not CPU and tokens == 1
            arms = {
                name: Arm(
                    sessions[which],
                    inputs[which],
                    provider.device,
                    (batch, tokens, past),
                    str(10 * number + 100 * batch + place) if capture else _NO_CAPTURE,
                )
                for place, (name, which) in enumerate(
                    {"guarded": "guarded", "unguarded": "unguarded", "control": "unguarded"}.items()
                )
            }
            found = _interleaved(arms, 20 if tokens > 1 else 200, until)
            if provider is not CPU and torch.cuda.is_available():
                counts = {name: _kernels(arms[name]) for name in ("guarded", "unguarded")}
                found["kernels"] = counts
            say({f"{case}, batch {batch}": found})


def check(
    family: FamilyName, size: str, cuda: bool, folder: Path, minutes: float, out: Path
) -> Outcome:
    """Writes what it has into `out` as it goes; stops between cases when its time is over."""
    until = time.monotonic() + 60 * minutes / 2
    number: Number = "float16" if cuda else "float32"
    decoders = random_decoders(family, size, number, folder, shared=True)
    shape = SHAPES[family, size]
    figures: dict[str, Any] = {
        "parameters, millions": decoders.parameters / 1e6,
        "number": number,
        "guard": f"{len(decoders.spec.edits)} edits and a gate in {shape.layers} layers",
        "guard nodes": len(decoders.nodes),
    }

    def say(more: dict[str, Any]) -> None:
        figures.update(more)
        Outcome("failed", "cut off; what was measured until then", figures).write(out)

    said = ""
    if cuda:
        captured = replace(_CUDA, options=(*_CUDA.options, ("enable_cuda_graph", "1")))
        try:
            _timed(decoders, captured, size, until, say)
            return Outcome("done", "decode by CUDA graphs", figures)
        except _FAULTS as error:
            said = f"no CUDA graphs: {str(error)[:300]}"
            say({"CUDA graphs": said})
    _timed(decoders, _CUDA if cuda else CPU, size, until, say)
    return Outcome("done", said or "no CUDA graphs on the CPU", figures)
