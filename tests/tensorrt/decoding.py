"""A prompt fed to a decoder graph call by call, whatever its cache, and what came out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime

Array = npt.NDArray[Any]
STEPS = 8
# what a cache holds where nothing was written yet: finite, and large enough to be noticed
_RUBBISH = 50.0


@dataclass(frozen=True)
class Prompt:
    """T prompt tokens and STEPS more of B rows, left-padded.

    embeds [B, T + STEPS, d] float32, mask and images [B, T + STEPS], positions [..., T + STEPS].
    """

    embeds: Array
    mask: Array
    images: Array
    positions: Array

    @property
    def calls(self) -> list[slice]:
        """The prompt in two pieces, the second on a cache, then one token at a time."""
        total = self.mask.shape[1] - STEPS
        single = [slice(at, at + 1) for at in range(total, total + STEPS)]
        return [slice(0, total // 2), slice(total // 2, total), *single]


def mixed_prompt(width: int, mrope: bool, with_images: bool, seed: int = 3) -> Prompt:
    """Three rows of 11, 7 and 4 tokens; the first two begin with an image of 4, if any."""
    rng = np.random.default_rng(seed)
    lengths, total = (11, 7, 4), 11
    mask = np.zeros((3, total + STEPS), np.int64)
    images = np.zeros(mask.shape, bool)
    for row, length in enumerate(lengths):
        mask[row, total - length :] = 1
        images[row, total - length + 1 : total - length + 5] = with_images and row < 2
    place = np.maximum(mask.cumsum(axis=1) - 1, 0)
    if mrope:  # an image's rows and columns count apart from its time
        place = np.stack([place, place + 2 * images, place + images])
    embeds = rng.standard_normal((*mask.shape, width)).astype(np.float32)
    return Prompt(embeds, mask, images, place)


def open_decoder(path: Path) -> onnxruntime.InferenceSession:
    """The file as it stands, no operator fused: two graphs compute alike what they share."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def decode(
    session: onnxruntime.InferenceSession, prompt: Prompt, starts: Array | None = None
) -> list[dict[str, Array]]:
    """Every call's outputs but the cache, which goes round.

    starts: [B], the column of a static cache from which each row is written; zeros if not given.
    """
    inputs = {value.name: value for value in session.get_inputs()}
    outputs = [value.name for value in session.get_outputs()]
    state = _first_state(inputs, prompt)
    first = np.zeros(len(prompt.mask), np.int64) if starts is None else starts
    seen = []
    for call in prompt.calls:
        feeds = state | {
            "inputs_embeds": prompt.embeds[:, call],
            "position_ids": np.ascontiguousarray(prompt.positions[..., call]),
            "guard_image_mask": prompt.images[:, call],
        }
        if "write_indices" in inputs:
            capacity = inputs["attention_mask"].shape[1]
            feeds |= _places(prompt.mask[:, : call.stop], first, call.start, capacity)
        else:
            feeds["attention_mask"] = prompt.mask[:, : call.stop]
        given = {name: value for name, value in feeds.items() if name in inputs}
        found = dict(zip(outputs, session.run(None, given), strict=True))
        for name in [name for name in found if name.startswith("present.")]:
            state[name.replace("present.", "past_key_values.")] = found.pop(name)
        for name in [name for name in found if name in ("guard_state_out", "guard_memory_out")]:
            state[name.removesuffix("_out")] = found[name]
        seen.append(found)
    return seen


def _first_state(inputs: dict[str, Any], prompt: Prompt) -> dict[str, Array]:
    rows = len(prompt.mask)
    lengths = prompt.mask[:, :-STEPS].sum(axis=1)
    state: dict[str, Array] = {
        "guard_state": -lengths,
        "guard_memory": np.zeros((rows, 3), np.float32),
    }
    for name, value in inputs.items():
        if name.startswith("past_key_values."):
            tokens = value.shape[2] if isinstance(value.shape[2], int) else 0
            dtype = {"tensor(float)": np.float32, "tensor(float16)": np.float16}[value.type]
            shape = (rows, value.shape[1], tokens, value.shape[3])
            state[name] = np.full(shape, _RUBBISH, dtype)
        if name.startswith("guard_text_"):
            state[name] = np.full((rows, value.shape[1]), 0.5, np.float32)
    return state


def _places(mask: Array, first: Array, start: int, capacity: int) -> dict[str, Array]:
    """The mask by column of the cache; columns not written yet pretend to be real."""
    columns = np.ones((len(mask), capacity), np.int64)
    for row, at in enumerate(first):
        columns[row, :at] = 0
        columns[row, at : at + mask.shape[1]] = mask[row]
    return {"attention_mask": columns, "write_indices": (first + start).astype(np.int32)}
