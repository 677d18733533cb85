"""Golden vectors: activations that reached the guard in the reference, to run the guard's nodes on.

A few tokens of a few requests: the last image tokens, the prompt's last tokens, the first new ones.
They need not be neighbours, for the guard's nodes see one token at a time and a running mean.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from guardbake import semantics as law
from guardbake.batch import Batch
from guardbake.plugins import REACHED, Trace
from guardbake.spec import GuardSpec

Array = npt.NDArray[Any]
ROWS, IMAGES, WORDS, NEW = 6, 3, 5, 3  # requests, and tokens of each kind that are kept of one


@dataclass(frozen=True, eq=False)
class GoldenVectors:
    """B requests of P = IMAGES + WORDS prompt tokens and then new ones, S together.

    reached: [B, S, d] float32 by site. mask: [B, S] int64, 0 where a request has fewer tokens.
    image_mask: [B, S] bool. scores: [B, S, G] float32, what the law makes of them, or None without
    a gate.
    """

    reached: Mapping[str, Array]
    mask: Array
    image_mask: Array
    scores: Array | None

    @property
    def prompt(self) -> int:
        """Columns of the prompt."""
        return IMAGES + WORDS


def golden_vectors(spec: GuardSpec, batch: Batch, truth: Trace) -> GoldenVectors:
    """Choose tokens of a reference run whose taps hold what reached each site."""
    width = batch.input_ids.shape[1]
    new = min(NEW, truth.tokens.shape[1] - 1)
    columns, mask = [], []
    for row in range(min(ROWS, len(batch.input_ids))):
        real = batch.attention_mask[row] == 1
        shown = np.flatnonzero(batch.image_mask[row])[-IMAGES:]
        words = np.flatnonzero(real & ~batch.image_mask[row])[-IMAGES - WORDS + len(shown) :]
        places = np.sort(np.concatenate([shown, words]))
        missing = IMAGES + WORDS - len(places)
        columns.append(np.concatenate([[0] * missing, places, width + np.arange(new)]))
        mask.append([0] * missing + [1] * (len(places) + new))
    at = np.arange(len(columns))[:, None], np.array(columns, np.int64)
    reached = {
        name.removeprefix(REACHED): np.ascontiguousarray(tap[at], np.float32)
        for name, tap in sorted(truth.taps.items())
        if name.startswith(REACHED)
    }
    images = np.pad(batch.image_mask, ((0, 0), (0, new)))[at]
    attention = np.array(mask, np.int64)
    scores = _scores(spec, reached, attention, images) if spec.sensors else None
    return GoldenVectors(reached, attention, images, scores)


def _scores(spec: GuardSpec, reached: Mapping[str, Array], mask: Array, images: Array) -> Array:
    """[B, S, G] float32 by the law in float64, from an empty memory."""
    found = []
    for sensor in spec.sensors:
        xs = [reached[str(site)].astype(np.float64) for site in sensor.sites]
        wide = law.features(xs, sensor.readings)
        if sensor.pools:
            empty = np.zeros((len(mask), 3))
            found.append(law.pooled_score(wide, sensor.thresholds, mask, images, empty)[0])
        else:
            found.append(law.score(wide, sensor.thresholds))
    return np.stack(found, axis=-1).astype(np.float32)
