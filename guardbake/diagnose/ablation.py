"""What a causal trace takes out of the decoder, and what it puts in its place.

The decoder adds an attention output and an FFN output to the residual in every layer. An ablation
replaces such a contribution at every token, prompt and answer:

- skip: nothing is added.
- zero: a zero is added, which in a decoder that adds its halves is the same function as skip.
- mean: the mean contribution over harmless prompts to tokens of the same role (see ROLES).
- resample: the contribution to the token at the same relative position of a harmless prompt.

Skip takes away whatever the layer does, language included; resample only takes away what the layer
knows of this request. The public protocol of CARE (arXiv 2603.27240) skips layers l and l + 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from guardbake.component import PARTS, Kind, Part

Flags = npt.NDArray[np.bool_]
Indices = npt.NDArray[np.int64]

# A prompt's first token is where attention sinks, its last is where the answer is decided.
ROLES = ("first", "text", "image", "last", "answer")
FIRST, TEXT, IMAGE, LAST, ANSWER = range(len(ROLES))


@dataclass(frozen=True)
class Ablation:
    """part: of decoder layer `layer`; "pair" is that layer and the next, both wholly."""

    layer: int
    part: Part
    kind: Kind

    def __str__(self) -> str:
        return f"{self.kind} {self.part} {self.layer}"

    @property
    def last_layer(self) -> int:
        """The last layer that it changes: what comes after can be resumed."""
        return self.layer + (self.part == "pair")

    @property
    def computed_as(self) -> Ablation:
        """The ablation that gives the same numbers and is the one computed."""
        return Ablation(self.layer, self.part, "skip") if self.kind == "zero" else self


def ablations(layers: int, parts: Sequence[Part], kinds: Sequence[Kind]) -> Iterator[Ablation]:
    """Every part of every layer in every kind, each once, in that order; pairs are skipped only."""
    for part in PARTS:
        if part not in parts:
            continue
        for kind in dict.fromkeys(kinds):
            if part != "pair":
                yield from (Ablation(layer, part, kind) for layer in range(layers))
        if part == "pair":
            yield from (Ablation(layer, part, "skip") for layer in range(layers - 1))


def roles(image: Flags) -> Indices:
    """[T] role of each prompt token, from which of them are image tokens."""
    out = np.where(image, IMAGE, TEXT)
    out[0], out[-1] = FIRST, LAST
    return out.astype(np.int64)


def same_place(image: Flags, donor_image: Flags) -> Indices:
    """[T] the donor's token at the same relative position, for each token of a prompt.

    image [T], donor_image [D]: which tokens are image tokens. Positions are relative within runs of
    text and of image if both prompts have the same runs, else within the whole prompt.
    """
    own, other = _edges(image), _edges(donor_image)
    if len(own) != len(other) or image[0] != donor_image[0]:
        own, other = [0, len(image)], [0, len(donor_image)]
    parts = []
    for (start, stop), (begin, end) in zip(pairwise(own), pairwise(other), strict=True):
        scale = (end - begin - 1) / max(stop - start - 1, 1)
        parts.append(begin + np.rint(np.arange(stop - start) * scale).astype(np.int64))
    return np.concatenate(parts)


def choose_donors(lengths: Sequence[int], candidates: Sequence[int], seed: int) -> list[int]:
    """For each of N prompts one of the candidate donors, drawn with the seed.

    lengths: tokens of each prompt. candidates: tokens of each donor. Drawn among the quarter of the
    donors (at least two) whose lengths are nearest, so that relative positions mean the same.
    """
    rng = np.random.default_rng(seed)
    near = max(2, len(candidates) // 4)
    chosen = []
    for length in lengths:
        order = np.argsort(np.abs(np.asarray(candidates) - length), kind="stable")
        chosen.append(int(rng.choice(order[:near])))
    return chosen


def _edges(flags: Flags) -> list[int]:
    """Where runs of equal neighbours begin, and the end."""
    return [0, *(np.flatnonzero(np.diff(flags)) + 1).tolist(), len(flags)]
