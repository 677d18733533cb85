"""Golden runs: feeds and the reference's answers in one safetensors file beside the engine.

With them parity is checked again anywhere, without PyTorch and without the source model. They hold
token ids and pixels of the recipe's parity prompts, a few activations, nothing else of the samples.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from guardbake.artifact import safetensors_bytes
from guardbake.batch import Batch
from guardbake.check.golden_vectors import GoldenVectors
from guardbake.errors import MalformedError
from guardbake.plugins import Trace

Array = npt.NDArray[Any]
_IMAGES = ("pixel_values", "image_grid_thw", "image_tiling", "instruction_ids")
_FEEDS = ("input_ids", "attention_mask", "image_mask", *_IMAGES)
_TRACE = (
    "tokens",
    "prefill_logits",
    "step_logits",
    "lengths",
    "valid",
    "guard_score",
    "guard_open",
    "guard_state",
)


_REACHED = "vectors.reached."
_UNREADABLE = (OSError, SafetensorError, AttributeError, LookupError, TypeError, ValueError)
_VECTORS = ("mask", "image_mask", "scores")


@dataclass(frozen=True, eq=False)
class Golden:
    """runs: feeds and the reference's answers by name. vectors: what the guard's nodes are run on.

    guard: digest of the guard they were made with. noise: the reference's distance from itself in
    float32, see `check.distribution.against_noise`. number: what the bundle's graphs compute in.
    floors: by half precision, see `check.floors`.
    """

    runs: Mapping[str, tuple[Batch, Trace]]
    vectors: GoldenVectors
    guard: str
    noise: float
    number: str = "float32"
    floors: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


def save_golden(path: Path, golden: Golden) -> None:
    """Write it; prefill logits of the last position only, taps not at all."""
    arrays: dict[str, Array] = {}
    for name, (batch, trace) in golden.runs.items():
        for key in _FEEDS:
            _put(arrays, f"{name}.feed.{key}", getattr(batch, key))
        for key in _TRACE:
            value = getattr(trace, key)
            _put(arrays, f"{name}.trace.{key}", value[:, -1:] if key == "prefill_logits" else value)
    for key in _VECTORS:
        _put(arrays, f"vectors.{key}", getattr(golden.vectors, key))
    for site, vectors in golden.vectors.reached.items():
        _put(arrays, f"{_REACHED}{site}", vectors)
    meta = {
        "guardbake.golden": json.dumps(list(golden.runs)),
        "guard": golden.guard,
        "noise": repr(golden.noise),
        "number": golden.number,
        "floors": json.dumps({name: dict(golden.floors[name]) for name in sorted(golden.floors)}),
    }
    path.write_bytes(safetensors_bytes(arrays, meta))


def load_golden(path: Path) -> Golden:
    """What `save_golden` wrote; MalformedError if it is unreadable."""
    try:
        with safe_open(str(path), framework="np") as file:
            meta = file.metadata() or {}
            arrays = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        names: Sequence[str] = json.loads(meta["guardbake.golden"])
        runs = {name: _run(arrays, name) for name in names}
        # before these two were stated there was float32 alone
        number, said = meta.get("number", "float32"), json.loads(meta.get("floors", "{}"))
        floors = {each: {k: float(v) for k, v in said[each].items()} for each in said}
        noise = float(meta["noise"])
        return Golden(runs, _vectors(arrays), meta["guard"], noise, number, floors)
    except _UNREADABLE as error:
        raise MalformedError(
            found=f"{type(error).__name__}: {error}",
            expected="golden runs as guardbake bake writes them",
            where=str(path),
            remedy="bake again",
        ) from error


def _put(arrays: dict[str, Array], name: str, value: Array | None) -> None:
    if value is not None:
        arrays[name] = np.ascontiguousarray(value)


def _run(arrays: Mapping[str, Array], name: str) -> tuple[Batch, Trace]:
    feed = {key: arrays.get(f"{name}.feed.{key}") for key in _FEEDS}
    seen = {key: arrays.get(f"{name}.trace.{key}") for key in _TRACE}
    for key in ("input_ids", "attention_mask", "image_mask"):
        if feed[key] is None:
            raise KeyError(f"{name}.feed.{key}")
    for key in ("tokens", "prefill_logits", "step_logits", "lengths", "valid"):
        if seen[key] is None:
            raise KeyError(f"{name}.trace.{key}")
    return Batch(**feed), Trace(**seen, taps={})  # type: ignore[arg-type]


def _vectors(arrays: Mapping[str, Array]) -> GoldenVectors:
    return GoldenVectors(
        {
            name.removeprefix(_REACHED): array
            for name, array in sorted(arrays.items())
            if name.startswith(_REACHED)
        },
        arrays["vectors.mask"],
        arrays["vectors.image_mask"],
        arrays.get("vectors.scores"),
    )
