"""Run an exported model in onnxruntime on the CPU: numpy in, numpy out, no torch."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors

from guardbake.batch import Batch, prefill_stops, without_images
from guardbake.errors import MalformedError, UnsupportedError, UsageError
from guardbake.plugins import Trace, first_end
from guardbake.vlm.tokens import next_positions, positions

from guardbake_onnx.description import Description, read_description
from guardbake_onnx.grid import vision_inputs

Array = npt.NDArray[Any]

_DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
_GUARD_OUTPUT = re.compile(r"guard_(?:score|open)(?:_\d+)?")  # with a number of several gates
_TEXT, _HEARD = "guard_text_", "guard_heard_"


class OnnxRunner:
    """The Runner of a folder that OnnxExporter wrote, guarded or not.

    threads: of onnxruntime's kernels, 0 for one a core. Sessions open on first use. A decoder with
    the input `guard_state` gets it, starting at minus the prompt's length and then fed back;
    `guard_memory` starts at zeros, and `guard_image_mask` tells it the prompt's image tokens. One
    with inputs `guard_text_<layer>` is asked for the prompt without its images first.
    """

    def __init__(self, folder: Path, *, threads: int = 0) -> None:
        self.folder = folder
        self.description: Description = read_description(folder)
        self._threads = threads
        self._sessions: dict[str, onnxruntime.InferenceSession] = {}

    def run(
        self,
        batch: Batch,
        steps: int,
        forced_tokens: Array | None = None,
        chunk: int | None = None,
        keep_prefill: bool = True,
    ) -> Trace:
        """See guardbake.plugins.Runner. Raises UsageError on impossible arguments."""
        _check_arguments(batch, steps, forced_tokens, chunk)
        decoding = _Decoding(self._session("decoder"), self.description, batch)
        if decoding.told:
            decoding.tell(self._hear(batch))
        prefill = self._prefill(decoding, batch, chunk, keep_prefill)
        chosen: list[Array] = []
        logits = [prefill[:, -1]]
        ends = frozenset(self.description.end_ids)
        for step in range(steps):
            greedy = logits[-1].argmax(axis=-1)
            chosen.append(greedy if forced_tokens is None else forced_tokens[:, step])
            if step == steps - 1 or (forced_tokens is None and _all_ended(chosen, ends)):
                break
            ids = np.asarray(chosen[-1])[:, None].astype(np.int64)
            place = next_positions(decoding.prompt_positions, step)
            embeds = self._embed(ids, self._no_features())
            logits.append(decoding.call(embeds, np.ones_like(ids), place)[:, -1])
        tokens = np.stack(chosen, axis=1) if chosen else np.zeros((len(batch.input_ids), 0))
        tokens = tokens.astype(np.int64)
        return decoding.trace(
            tokens, prefill, np.stack(logits[: len(chosen)] or [prefill[:, -1]], axis=1), ends
        )

    def _hear(self, batch: Batch) -> dict[str, Array]:
        """What the guard hears in the prompt without its images, by layer, the gate shut."""
        words = without_images(batch)
        decoding = _Decoding(self._session("decoder"), self.description, words)
        decoding.shut()
        self._prefill(decoding, words, None, keep=False)
        return decoding.heard

    def features(self, batch: Batch) -> Array | None:
        """Image features [N, d] of every image of the batch, or None without images."""
        return self._seen(batch).get("image_features")

    def _seen(self, batch: Batch) -> dict[str, Array]:
        """What the tower says of the batch's images, by output; nothing without images."""
        if batch.pixel_values is None:
            return {}
        session = self._session("vision")
        geometry, types = self.description.vision, {v.name: v.type for v in session.get_inputs()}
        feeds = vision_inputs(
            geometry, batch.pixel_values, batch.image_grid_thw, batch.image_tiling
        )
        for name, value in feeds.items():
            feeds[name] = value.astype(_DTYPES.get(types[name], value.dtype), copy=False)
        names = [output.name for output in session.get_outputs()]
        return dict(zip(names, session.run(names, feeds), strict=True))

    def embed(self, input_ids: Array, features: Array | None) -> Array:
        """inputs_embeds [B, S, d] of input_ids [B, S], image features [N, d] in their places.

        Raises UsageError unless there are as many features as image tokens.
        """
        given = self._no_features() if features is None else features
        wanted = int((input_ids == self.description.image_token_id).sum())
        if wanted != len(given):
            raise UsageError(
                found=f"{len(given)} image features",
                expected=f"{wanted}, one for each image token",
                where="the batch",
                remedy="collate with the processor of the exported checkpoint",
            )
        return self._embed(input_ids, given)

    def _embed(self, input_ids: Array, features: Array) -> Array:
        session = self._session("embedding")
        dtype = _DTYPES[session.get_inputs()[1].type]
        feeds = {"input_ids": input_ids, "image_features": features.astype(dtype, copy=False)}
        return np.asarray(session.run(["inputs_embeds"], feeds)[0])

    def _no_features(self) -> Array:
        return np.zeros((0, self.description.hidden), np.float32)

    def _prefill(self, decoding: _Decoding, batch: Batch, chunk: int | None, keep: bool) -> Array:
        seen = self._seen(batch)
        embeds = self.embed(batch.input_ids, seen.get("image_features"))
        if "deepstack_features" in seen:
            decoding.show(seen["deepstack_features"])
        parts: list[Array] = []
        start = 0
        for stop in prefill_stops(batch, chunk, self.description.mask == "image"):
            piece, start = slice(start, stop), stop
            logits = decoding.call(
                embeds[:, piece],
                batch.attention_mask[:, piece],
                decoding.prompt_positions[..., piece],
            )
            parts = [*parts, logits] if keep else [logits[:, -1:]]
        return np.concatenate(parts, axis=1)

    def _session(self, name: str) -> onnxruntime.InferenceSession:
        if name not in self._sessions:
            self._sessions[name] = open_session(self.folder / f"{name}.onnx", self._threads)
        return self._sessions[name]


def open_session(path: Path, threads: int) -> onnxruntime.InferenceSession:
    """A CPU session; MalformedError names the file if onnxruntime cannot load it."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except (
        ort_errors.Fail,
        ort_errors.InvalidGraph,
        ort_errors.InvalidProtobuf,
        ort_errors.NoSuchFile,
        ort_errors.RuntimeException,
    ) as error:
        raise MalformedError(
            found=str(error),
            expected="a graph that onnxruntime loads",
            where=str(path),
            remedy="export the model again",
        ) from error


class _Decoding:
    """The decoder's calls for one batch: cache, mask and guard state from one to the next."""

    def __init__(
        self, session: onnxruntime.InferenceSession, description: Description, batch: Batch
    ) -> None:
        self._session = session
        self._outputs = [output.name for output in session.get_outputs()]
        types = {value.name: value.type for value in session.get_inputs()}
        rows = len(batch.input_ids)
        empty = (rows, description.kv_heads, 0, description.head_dim)
        self._state: dict[str, Array] = {
            name: np.zeros(empty, _DTYPES[kind])
            for name, kind in types.items()
            if name.startswith("past_key_values.")
        }
        if "guard_state" in types:
            self._state["guard_state"] = -batch.prompt_lengths.astype(np.int64)
        if "guard_memory" in types:
            self._state["guard_memory"] = np.zeros((rows, 3), np.float32)
        self.told = {
            value.name: np.zeros((rows, value.shape[1]), np.float32)
            for value in session.get_inputs()
            if value.name.startswith(_TEXT)
        }
        self.heard: dict[str, Array] = {}
        self._dtype = _DTYPES[types["inputs_embeds"]]
        self._mask = batch.attention_mask[:, :0]
        self._told_images = [n for n in ("guard_image_mask", "image_mask") if n in types]
        levels = (description.deepstack, *batch.image_mask.shape, description.hidden)
        self._deepstack = np.zeros(levels, self._dtype)
        self._images = batch.image_mask
        self._valid = batch.attention_mask == 1
        self._seen: dict[str, list[Array]] = {}
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
        self._state["guard_state"] = np.ones(len(self._valid), np.int64)

    def tell(self, heard: dict[str, Array]) -> None:
        """Hand the guard, by layer, what it heard in another decoding."""
        self.told = {name: heard[name.removeprefix(_TEXT)] for name in self.told}

    def call(self, embeds: Array, mask: Array, position_ids: Array) -> Array:
        """Feed S tokens, embeds [B, S, d] and mask [B, S]; returns logits [B, S, V]."""
        start = self._mask.shape[1]
        self._mask = np.concatenate([self._mask, mask], axis=1)
        feeds = {
            "inputs_embeds": embeds.astype(self._dtype, copy=False),
            "attention_mask": self._mask,
            "position_ids": np.ascontiguousarray(position_ids),
            **self._state,
            **self.told,
        }
        if len(self._deepstack):
            levels = self._deepstack[:, :, start : start + mask.shape[1]]
            nothing = np.zeros((len(levels), *embeds.shape), self._dtype)  # for new tokens
            feeds["deepstack_embeds"] = levels if levels.shape[2] else nothing
        piece = self._images[:, start : start + mask.shape[1]]
        words = np.zeros_like(mask, dtype=bool)  # new tokens are no image tokens
        for name in self._told_images:
            feeds[name] = piece if piece.size else words
        logits = None
        for name, value in zip(self._outputs, self._session.run(None, feeds), strict=True):
            if name == "logits":
                logits = np.asarray(value, np.float32)
            elif name.startswith("present."):
                self._state["past_key_values." + name.removeprefix("present.")] = value
            elif name in ("guard_state_out", "guard_memory_out"):
                self._state[name.removesuffix("_out")] = value
            elif name.startswith(_HEARD):
                self.heard[name.removeprefix(_HEARD)] = value
            else:
                self._keep(name, np.asarray(value), mask.shape[1])
        if logits is None:
            raise MalformedError(
                found=f"outputs {self._outputs}",
                expected="an output named logits",
                where="decoder.onnx",
                remedy="export the model again",
            )
        return logits

    def trace(self, tokens: Array, prefill: Array, steps: Array, ends: frozenset[int]) -> Trace:
        """Everything seen so far as a Trace."""
        seen = {name: np.concatenate(parts, axis=1) for name, parts in self._seen.items()}
        return Trace(
            tokens=tokens,
            prefill_logits=prefill,
            step_logits=steps[:, : tokens.shape[1]],
            lengths=first_end(tokens, ends),
            valid=self._valid,
            guard_score=_of_gates(seen, "guard_score"),
            guard_open=_of_gates(seen, "guard_open"),
            guard_state=self._state.get("guard_state"),
            taps={name: value for name, value in seen.items() if not _GUARD_OUTPUT.fullmatch(name)},
        )

    def _keep(self, name: str, value: Array, tokens: int) -> None:
        if value.ndim < 2 or value.shape[1] != tokens:
            raise UnsupportedError(
                found=f"output {name} of shape {list(value.shape)}",
                expected=f"axis 1 to be the {tokens} tokens of the call",
                where="decoder.onnx",
                remedy="tap a value that has one entry for each token",
            )
        self._seen.setdefault(name, []).append(value)


def _of_gates(seen: dict[str, Array], name: str) -> Array | None:
    """What every gate said under `name`, [B, T, G], or None without a gate."""
    own = [key for key in seen if _GUARD_OUTPUT.fullmatch(key) and key.startswith(name)]
    ordered = sorted(own, key=lambda key: (len(key), key))
    return np.stack([seen[key] for key in ordered], axis=-1) if ordered else None


def _all_ended(chosen: list[Array], ends: frozenset[int]) -> bool:
    tokens = np.stack(chosen, axis=1)
    return bool(np.isin(tokens, sorted(ends)).any(axis=1).all())


def _check_arguments(
    batch: Batch, steps: int, forced_tokens: Array | None, chunk: int | None
) -> None:
    shape = (len(batch.input_ids), steps)
    wrong = None
    if steps < 0 or (chunk is not None and chunk < 1):
        wrong = f"steps {steps}, chunk {chunk}"
    elif forced_tokens is not None and forced_tokens.shape != shape:
        wrong = f"forced tokens of shape {list(forced_tokens.shape)}"
    if wrong is not None:
        raise UsageError(
            found=wrong,
            expected=f"steps >= 0, chunk >= 1, forced tokens {list(shape)}",
            where="the arguments of run",
            remedy="correct the call",
        )
