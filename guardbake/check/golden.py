"""Golden runs: feeds and the reference's answers in one safetensors file beside the engine.

With them parity is checked again anywhere, without PyTorch and without the source model. They hold
token ids and pixels of the recipe's parity prompts, nothing else of the samples.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from guardbake.artifact import safetensors_bytes
from guardbake.batch import Batch
from guardbake.errors import MalformedError
from guardbake.plugins import Trace

Array = npt.NDArray[Any]
_FEEDS = ("input_ids", "attention_mask", "image_mask", "pixel_values", "image_grid_thw")
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


def save_golden(path: Path, runs: Mapping[str, tuple[Batch, Trace]], guard_digest: str) -> None:
    """Write the runs by name; prefill logits of the last position only, taps not at all."""
    arrays: dict[str, Array] = {}
    for name, (batch, trace) in runs.items():
        for key in _FEEDS:
            _put(arrays, f"{name}.feed.{key}", getattr(batch, key))
        for key in _TRACE:
            value = getattr(trace, key)
            _put(arrays, f"{name}.trace.{key}", value[:, -1:] if key == "prefill_logits" else value)
    meta = {"guardbake.golden": json.dumps(list(runs)), "guard": guard_digest}
    path.write_bytes(safetensors_bytes(arrays, meta))


def load_golden(path: Path) -> tuple[dict[str, tuple[Batch, Trace]], str]:
    """The runs and the digest of the guard they were made with; MalformedError if unreadable."""
    try:
        with safe_open(str(path), framework="np") as file:
            meta = file.metadata() or {}
            arrays = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        names: Sequence[str] = json.loads(meta["guardbake.golden"])
        return {name: _run(arrays, name) for name in names}, meta["guard"]
    except (OSError, SafetensorError, KeyError, json.JSONDecodeError) as error:
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
