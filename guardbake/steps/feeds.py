"""Feeds that an exported decoder takes: a short prompt, then one token, the cache fed back.

The prompt is drawn from a fixed seed. What matters is that every tensor is one the model really
computes; which words they stand for does not.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from guardbake.errors import UnsupportedError
from guardbake.passes.insert import IMAGES_IN, MEMORY_IN, STATE_IN

Array = npt.NDArray[Any]
BATCH, PROMPT = 2, 6
_TEXT = "guard_text_"
# Sizes by the names that TensorRT Edge-LLM gives them: one sequence, packed, on one page.
_PACKED = {
    "physical_tokens": PROMPT,
    "num_sequences": 1,
    "num_sequences + 1": 2,
    "num_pages": 1,
    "max_pages_per_seq": 1,
    "execution_phase_extent": 1,
    "num_context_sequences": 1,
}
_PACKED_INPUTS = frozenset(
    {
        "rope_rotary_cos_sin",
        "positions",
        "query_start_offsets",
        "query_lengths",
        "past_lengths",
        "attention_sequence_lengths",
        "state_indices",
        "execution_phase_marker",
        "context_sequence_count_carrier",
        "kv_page_table",
        "logits_indices",
    }
)


class Feeds:
    """One decoding of a graph: `prompt()`, then `step(outputs)` with what the last call gave.

    inputs: of the graph, guarded or not; what they do not name is not fed. head_size: of the cache,
    where the graph leaves it open. rows: how many at most.
    """

    def __init__(
        self,
        inputs: Sequence[ir.Value],
        vocabulary: int,
        head_size: int | None,
        rows: int = BATCH,
    ) -> None:
        self.inputs = inputs
        self.vocabulary = vocabulary
        self.head_size = head_size
        self.packed = not any(str(value.name) == "attention_mask" for value in inputs)
        self.batch = _batch(inputs, rows)
        self.past = 0

    def prompt(self, tokens: int = PROMPT) -> dict[str, Array]:
        return {str(value.name): self._made(value, tokens) for value in self.inputs}

    def step(
        self, before: Mapping[str, Array], outputs: Mapping[str, Array], tokens: int = 1
    ) -> dict[str, Array]:
        """The feeds of the next call, of one token or of several: a second turn."""
        self.past = before["attention_mask"].shape[1]
        feeds = {str(value.name): self._made(value, tokens) for value in self.inputs}
        for name in feeds:
            source = _present(name) or f"{name}_out"
            if source in outputs:
                feeds[name] = outputs[source]
            elif name.startswith(_TEXT) or "/" in name:
                feeds[name] = before[name]
        return feeds

    def _made(self, value: ir.Value, tokens: int) -> Array:
        name, dtype = str(value.name), _numpy(value)
        rng = np.random.default_rng([len(name), *name.encode(), self.past])
        if self.packed:
            return self._packed(value, rng, dtype)
        total = self.past + tokens
        rows = (self.batch, tokens)
        if name == "input_ids":
            return rng.integers(0, self.vocabulary, rows).astype(dtype)
        if name == "inputs_embeds":
            return rng.standard_normal((*rows, _size(value, 2))).astype(dtype)
        if name == "deepstack_embeds":
            levels = (_size(value, 0), *rows, _size(value, 3))
            return rng.standard_normal(levels).astype(dtype)
        if name == "mutual_mask":
            return np.broadcast_to(np.arange(tokens) % 3 > 0, rows).copy()
        if name == "attention_mask":
            return np.ones((self.batch, total), dtype)
        if name == "position_ids":
            places = np.broadcast_to(np.arange(self.past, total), rows)
            three = value.shape is not None and len(value.shape) == 3
            return np.array(np.broadcast_to(places, (3, *rows)) if three else places, dtype)
        if name == "use_cache_branch":
            return np.array([self.past > 0])
        if _present(name):
            return np.zeros(self._cache(value), dtype)
        return self._guards(value, rng, rows)

    def _cache(self, value: ir.Value) -> list[int]:
        """The sizes of an empty cache, or of a state that does not grow."""
        inner = [] if value.shape is None else list(value.shape)[1:]
        fixed = [size for size in inner if isinstance(size, int)]
        if inner and len(fixed) == len(inner):
            return [self.batch, *fixed]
        return [self.batch, _size(value, 1), self.past, _size(value, 3, self.head_size)]

    def _guards(self, value: ir.Value, rng: np.random.Generator, rows: tuple[int, int]) -> Array:
        """An input of the guard's own."""
        name = str(value.name)
        if name == STATE_IN:
            return np.full(self.batch, -PROMPT, np.int64)
        if name == MEMORY_IN:
            return np.zeros((self.batch, 3), np.float32)
        if name == IMAGES_IN:
            return np.broadcast_to(np.arange(rows[1]) % 2 == 1, rows).copy()
        if name.startswith(_TEXT):
            return rng.standard_normal((self.batch, _size(value, 1))).astype(np.float32)
        if name.endswith("/thresholds"):
            return np.zeros(_size(value, 0), np.float32)  # the check puts its own there
        raise _unknown(f"input {name} of shape {value.shape}")

    def _packed(self, value: ir.Value, rng: np.random.Generator, dtype: np.dtype[Any]) -> Array:
        name = str(value.name)
        if "/" in name:
            return self._guards(value, rng, (PROMPT, 1))
        if name not in (*_PACKED_INPUTS, "inputs_embeds") and not _present(name):
            raise _unknown(f"input {name} of shape {value.shape}")
        shape = [_PACKED[str(d)] if not isinstance(d, int) else d for d in _named(value)]
        if name == "logits_indices":
            return np.full(shape, PROMPT - 1, dtype)
        if np.issubdtype(dtype, np.floating) and not _present(name):
            return rng.standard_normal(shape).astype(dtype)
        return np.zeros(shape, dtype)


def head_size_of(folder: Path) -> int | None:
    """The cache's last size by the exporter's configuration files, or None if they do not say."""
    for name, keys in (
        ("genai_config.json", ("model", "decoder", "head_size")),
        ("config.json", ("head_dim",)),
    ):
        path = folder / name
        try:
            value = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
        except (ValueError, RecursionError):
            value = None
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        if isinstance(value, int) and value > 0:
            return value
    return None


def _batch(inputs: Sequence[ir.Value], most: int) -> int:
    """As many rows as the graph allows, at most `most`."""
    firsts = [v.shape[0] for v in inputs if v.name in ("input_ids", "inputs_embeds") and v.shape]
    fixed = [first for first in firsts if isinstance(first, int)]
    return fixed[0] if fixed else most


def _present(name: str) -> str:
    """The output that gives the next call's cache `name`; empty if it is no cache."""
    for past, present in (
        ("past_key_values_", "present_key_values_"),
        ("past_key_values.", "present."),
    ):
        if name.startswith(past):
            return present + name.removeprefix(past)
    return ""


def _numpy(value: ir.Value) -> np.dtype[Any]:
    if value.dtype is None:
        raise _unknown(f"input {value.name} without a dtype")
    return np.dtype(value.dtype.numpy())


def _named(value: ir.Value) -> list[int | str]:
    dims = list(value.shape) if value.shape is not None else []
    named = [d.value if isinstance(d, ir.SymbolicDim) else d for d in dims]
    if any(d is None or (isinstance(d, str) and d not in _PACKED) for d in named):
        raise _unknown(f"input {value.name} of shape {value.shape}")
    return [d for d in named if d is not None]


def _size(value: ir.Value, axis: int, otherwise: int | None = None) -> int:
    dim = value.shape[axis] if value.shape is not None and axis < len(value.shape) else None
    size = dim if isinstance(dim, int) else otherwise
    if size is None:
        raise _unknown(f"input {value.name} of shape {value.shape}, axis {axis} of no known size")
    return size


def _unknown(found: str) -> UnsupportedError:
    return UnsupportedError(
        found=found,
        expected="the inputs of a decoder, of known dtypes and sizes",
        where="the numeric self-check",
        remedy="say --no-self-check, and check the graph where it runs",
    )
