"""Prefill and greedy decoding over executors: numpy in, numpy out, no torch, no runtime."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from guardbake.batch import Batch, in_groups, prefill_stops, without_images
from guardbake.errors import UsageError
from guardbake.plugins import Trace, first_end

from guardbake_onnx.decoding import CACHE, Decoding
from guardbake_onnx.description import Description
from guardbake_onnx.executor import Executor
from guardbake_onnx.grid import vision_inputs

Array = npt.NDArray[Any]

_GUARD_OUTPUT = re.compile(r"guard_(?:score|open)(?:_\d+)?")  # with a number of several gates


class ExecutorRunner:
    """The Runner of the graphs "decoder", "vision" and "embedding", whatever `open_graph` makes of
    their names, which happens on first use.

    A batch of more rows than the decoder takes goes through it in groups, step by step together,
    each with a cache of its own; a prompt of more tokens than it takes is fed in pieces. A decoder
    with inputs `guard_text_<layer>` is asked for the prompt without its images first.
    """

    def __init__(self, description: Description, open_graph: Callable[[str], Executor]) -> None:
        self.description = description
        self._open_graph = open_graph
        self._executors: dict[str, Executor] = {}

    @property
    def settings(self) -> dict[str, str]:
        """See guardbake.plugins.Runner: by graph that has been opened."""
        return {name: self._executors[name].settings for name in sorted(self._executors)}

    @property
    def number(self) -> str:
        """See guardbake.plugins.Runner: the type of the decoder's cache."""
        given = self._executor("decoder").inputs
        caches = [str(each.dtype) for name, each in given.items() if name.startswith(CACHE)]
        return caches[0] if caches else "float32"

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
        groups = in_groups(batch, self._executor("decoder").rows)
        decodings = [self._begin(group) for group in groups]
        fed = zip(decodings, groups, strict=True)
        prefill = np.concatenate([self._prefill(d, g, chunk, keep_prefill) for d, g in fed])
        chosen: list[Array] = []
        logits = [prefill[:, -1]]
        ends = frozenset(self.description.end_ids)
        for step in range(steps):
            greedy = logits[-1].argmax(axis=-1)
            chosen.append(greedy if forced_tokens is None else forced_tokens[:, step])
            if step == steps - 1 or (forced_tokens is None and _all_ended(chosen, ends)):
                break
            logits.append(self._step(decodings, groups, chosen[-1], step))
        tokens = np.stack(chosen, axis=1) if chosen else np.zeros((len(batch.input_ids), 0))
        seen = _joined([decoding.seen for decoding in decodings])
        states = [decoding.state for decoding in decodings]
        return Trace(
            tokens=tokens.astype(np.int64),
            prefill_logits=prefill,
            step_logits=np.stack(logits, axis=1)[:, : len(chosen)],
            lengths=first_end(tokens, ends),
            valid=batch.attention_mask == 1,
            guard_score=_of_gates(seen, "guard_score"),
            guard_open=_of_gates(seen, "guard_open"),
            guard_state=np.concatenate([s for s in states if s is not None])
            if states[0] is not None
            else None,
            taps={name: value for name, value in seen.items() if not _GUARD_OUTPUT.fullmatch(name)},
        )

    def features(self, batch: Batch) -> Array | None:
        """Image features [N, d] of every image of the batch, or None without images."""
        return self._seen(batch).get("image_features")

    def _seen(self, batch: Batch) -> dict[str, Array]:
        """What the tower says of the batch's images, by output; nothing without images."""
        if batch.pixel_values is None:
            return {}
        vision, geometry = self._executor("vision"), self.description.vision
        feeds = vision_inputs(
            geometry,
            batch.pixel_values,
            batch.image_grid_thw,
            batch.image_tiling,
            batch.instruction_ids,
        )
        given = {name: feeds[name].astype(vision.inputs[name].dtype) for name in feeds}
        return vision.run(given, {}, frozenset())[0]

    def embed(self, input_ids: Array, features: Array | None) -> Array:
        """inputs_embeds [B, S, d] of input_ids [B, S], image features [N, d] in their places.

        Raises UsageError unless there are as many features as image tokens.
        """
        given = self._no_features() if features is None else features
        shown = input_ids == self.description.image_token_id
        wanted = int(shown.sum())
        if wanted != len(given):
            raise UsageError(
                found=f"{len(given)} image features",
                expected=f"{wanted}, one for each image token",
                where="the batch",
                remedy="collate with the processor of the exported checkpoint",
            )
        most, columns = self._executor("embedding").tokens, input_ids.shape[1]
        if most is None or columns <= most:
            return self._embed(input_ids, given)
        row_of = np.cumsum(shown).reshape(shown.shape) - 1
        pieces = [slice(start, start + most) for start in range(0, columns, most)]
        parts = [self._embed(input_ids[:, p], given[row_of[:, p][shown[:, p]]]) for p in pieces]
        return np.concatenate(parts, axis=1)

    def _executor(self, name: str) -> Executor:
        if name not in self._executors:
            self._executors[name] = self._open_graph(name)
        return self._executors[name]

    def _begin(self, batch: Batch) -> Decoding:
        decoding = Decoding(self._executor("decoder"), self.description, batch)
        if decoding.told:
            words = without_images(batch)
            listening = Decoding(self._executor("decoder"), self.description, words)
            listening.shut()
            self._prefill(listening, words, None, keep=False)
            decoding.tell(listening.heard)
        return decoding

    def _prefill(self, decoding: Decoding, batch: Batch, chunk: int | None, keep: bool) -> Array:
        seen = self._seen(batch)
        embeds = self.embed(batch.input_ids, seen.get("image_features"))
        if "deepstack_features" in seen:
            decoding.show(seen["deepstack_features"])
        parts: list[Array] = []
        start = 0
        most = self._executor("decoder").tokens
        fitting = chunk if most is None else min(chunk or most, most)
        for stop in prefill_stops(batch, fitting, self.description.mask):
            piece, start = slice(start, stop), stop
            logits = decoding.call(
                embeds[:, piece],
                batch.attention_mask[:, piece],
                decoding.prompt_positions[..., piece],
            )
            parts = [*parts, logits] if keep else [logits[:, -1:]]
        return np.concatenate(parts, axis=1)

    def _step(
        self, decodings: Sequence[Decoding], groups: Sequence[Batch], tokens: Array, step: int
    ) -> Array:
        """Logits [B, V] after tokens [B]."""
        ends = np.cumsum([len(group.input_ids) for group in groups])[:-1]
        found = []
        for decoding, own in zip(decodings, np.split(tokens, ends), strict=True):
            embeds = self._embed(own[:, None].astype(np.int64), self._no_features())
            found.append(decoding.step(embeds, step))
        return np.concatenate(found)

    def _embed(self, input_ids: Array, features: Array) -> Array:
        embedding = self._executor("embedding")
        given = features.astype(embedding.inputs["image_features"].dtype)
        feeds = {"input_ids": input_ids, "image_features": given}
        return embedding.run(feeds, {}, frozenset())[0]["inputs_embeds"]

    def _no_features(self) -> Array:
        return np.zeros((0, self.description.hidden), np.float32)


def _joined(groups: Sequence[Mapping[str, Array]]) -> dict[str, Array]:
    return {name: np.concatenate([group[name] for group in groups]) for name in groups[0]}


def _of_gates(seen: Mapping[str, Array], name: str) -> Array | None:
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
