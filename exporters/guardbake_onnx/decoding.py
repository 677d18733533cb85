"""What a decoder is fed call by call, whatever executes it: tokens, masks, places in the cache.

The cache and the guard's own state stay on the device that computes them. Two layouts are known by
the graph's inputs: a cache that grows, and one of fixed capacity whose columns are written in place
(`write_indices`, see guardbake_tensorrt.static_cache).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from guardbake.batch import Batch, mutual_tokens
from guardbake.errors import MalformedError, UnsupportedError, UsageError
from guardbake.vlm.tokens import next_positions, positions

from guardbake_onnx.description import Description
from guardbake_onnx.executor import Executor, Resident

Array = npt.NDArray[Any]

LOGITS, STATE = "logits", "guard_state"
CACHE = "past_key_values."
_MEMORY, _DEEPSTACK = "guard_memory", "deepstack_embeds"
_IMAGES, _MUTUAL = "guard_image_mask", "mutual_mask"
_TEXT, _HEARD = "guard_text_", "guard_heard_"
_PLACES = "write_indices"


class Decoding:
    """The decoder's calls for one batch of B rows and T prompt tokens.

    `guard_state` starts at minus the prompt's length, `guard_memory` and the cache at zeros; from
    then on each call's outputs are the next one's inputs. told: by input, what the guard is to know
    of the prompt without its images. heard: by layer, what it heard in the last call. seen: every
    other output [B, tokens fed, ...] by name.
    """

    def __init__(self, executor: Executor, description: Description, batch: Batch) -> None:
        self._executor = executor
        self._state = _first_state(executor, description, batch)
        self._carried: dict[str, Resident] = {}
        self._next = {_source(name): name for name in self._state}
        rows, inputs = len(batch.input_ids), executor.inputs
        self.told = {
            name: np.zeros((rows, given.shape[1] or 0), np.float32)
            for name, given in inputs.items()
            if name.startswith(_TEXT)
        }
        self.heard: dict[str, Array] = {}
        self._parts: dict[str, list[Array]] = {}
        self._mask = batch.attention_mask[:, :0]
        self._images = batch.image_mask
        told = {_IMAGES: batch.image_mask, _MUTUAL: mutual_tokens(batch, description.mask)}
        self._told = {name: mask for name, mask in told.items() if name in inputs}
        dtype = inputs["inputs_embeds"].dtype
        levels = (description.deepstack, *batch.image_mask.shape, description.hidden)
        self._deepstack = np.zeros(levels, dtype)
        self._capacity = inputs["attention_mask"].shape[1] if _PLACES in inputs else None
        self.prompt_positions = positions(
            description.position,
            batch.attention_mask,
            image_mask=batch.image_mask,
            image_grid_thw=batch.image_grid_thw,
            merge=description.vision.merge,
        )

    def show(self, levels: Array) -> None:
        """Take the image tokens' features for the first layers, [levels, N, d] in their order."""
        self._deepstack[:, self._images] = levels

    def shut(self) -> None:
        """Close the gate for good: the calls compute what the unguarded model does."""
        self._state[STATE] = np.ones(len(self._mask), np.int64)

    def tell(self, heard: Mapping[str, Array]) -> None:
        """Hand the guard, by layer, what it heard in another decoding."""
        self.told = {name: heard[name.removeprefix(_TEXT)] for name in self.told}

    def step(self, embeds: Array, step: int) -> Array:
        """Feed the new token `step` of each row, embeds [B, 1, d]; returns logits [B, V]."""
        mask = np.ones(embeds.shape[:2], np.int64)
        return self.call(embeds, mask, next_positions(self.prompt_positions, step))[:, -1]

    def call(self, embeds: Array, mask: Array, position_ids: Array) -> Array:
        """Feed S tokens, embeds [B, S, d] and mask [B, S]; returns logits [B, S, V] float32.

        Raises UsageError if a cache of fixed capacity has no room for them.
        """
        start, tokens = self._mask.shape[1], mask.shape[1]
        self._mask = np.concatenate([self._mask, mask], axis=1)
        feeds = {
            "inputs_embeds": embeds.astype(self._executor.inputs["inputs_embeds"].dtype),
            "position_ids": position_ids,
            **self._places(start),
            **self._state,
            **self.told,
        }
        feeds |= self._of_prompt(start, tokens)
        found, kept = self._executor.run(feeds, self._carried, self._next.keys())
        self._carried = {self._next[name]: value for name, value in kept.items()}
        self._state = {n: value for n, value in self._state.items() if n not in self._carried}
        if LOGITS not in found:
            raise MalformedError(
                found=f"outputs {list(self._executor.outputs)}",
                expected=f"an output named {LOGITS}",
                where="the decoder",
                remedy="export the model again",
            )
        logits = found.pop(LOGITS)
        for name, value in found.items():
            if name.startswith(_HEARD):
                self.heard[name.removeprefix(_HEARD)] = value
            else:
                self._keep(name, value, tokens)
        return np.asarray(logits, np.float32)

    @property
    def seen(self) -> dict[str, Array]:
        return {name: np.concatenate(parts, axis=1) for name, parts in self._parts.items()}

    @property
    def state(self) -> Array | None:
        """The guard's state after the last call, [B] int64; None if it has none."""
        left = self._carried.get(STATE)
        return self._state.get(STATE) if left is None else left.numpy()

    def _of_prompt(self, start: int, tokens: int) -> dict[str, Array]:
        """What the graph asks of the call's image and prompt tokens; new tokens are neither."""
        call, (rows, columns) = slice(start, start + tokens), self._images.shape
        new = start >= columns
        nothing = np.zeros((rows, tokens), bool)
        feeds = {name: nothing if new else mask[:, call] for name, mask in self._told.items()}
        if len(self._deepstack):
            levels = self._deepstack[:, :, call]
            empty = (len(levels), rows, tokens, levels.shape[-1])
            feeds[_DEEPSTACK] = np.zeros(empty, levels.dtype) if new else levels
        return feeds

    def _places(self, start: int) -> dict[str, Array]:
        """The mask as the cache has it, and where this call is written."""
        if self._capacity is None:
            return {"attention_mask": self._mask}
        rows, total = self._mask.shape
        if total > self._capacity:
            raise UsageError(
                found=f"{total} tokens of prompt and answer",
                expected=f"at most {self._capacity}, the capacity of the cache",
                where="the decoder",
                remedy="ask for less, or build the engine with a larger --capacity",
            )
        columns = np.zeros((rows, self._capacity), np.int64)
        columns[:, :total] = self._mask
        return {"attention_mask": columns, _PLACES: np.full(rows, start, np.int32)}

    def _keep(self, name: str, value: Array, tokens: int) -> None:
        if value.ndim < 2 or value.shape[1] != tokens:
            raise UnsupportedError(
                found=f"output {name} of shape {list(value.shape)}",
                expected=f"axis 1 to be the {tokens} tokens of the call",
                where="the decoder",
                remedy="tap a value that has one entry for each token",
            )
        self._parts.setdefault(name, []).append(value)


def _first_state(executor: Executor, description: Description, batch: Batch) -> dict[str, Array]:
    rows = len(batch.input_ids)
    state: dict[str, Array] = {}
    for name, given in executor.inputs.items():
        if name.startswith(CACHE):
            tokens = given.shape[2] or 0  # a growing cache has none yet
            shape = (rows, description.kv_heads, tokens, description.head_dim)
            state[name] = np.zeros(shape, given.dtype)
    if STATE in executor.inputs:
        state[STATE] = -batch.prompt_lengths.astype(np.int64)
    if _MEMORY in executor.inputs:
        state[_MEMORY] = np.zeros((rows, 3), np.float32)
    return state


def _source(name: str) -> str:
    """The output that is the next call's input `name`."""
    if name.startswith(CACHE):
        return "present." + name.removeprefix(CACHE)
    return f"{name}_out"
