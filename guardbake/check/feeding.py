"""One candidate fed the same tokens in several ways, which must not matter.

In pieces, with more padding, the whole text in one call without a cache, and each request alone:
prefill + decode == whole prefill, chunked == whole, a batch of mixed lengths == each alone, padding
never matters. What is compared is the candidate with itself, so that a fault of the cache is not
lost in the difference to the reference.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from guardbake.batch import Batch, alone
from guardbake.check.comparison import (
    Budgets,
    Comparison,
    Difference,
    gap,
    largest,
    step_mask,
    token_mask,
)
from guardbake.plugins import Runner, Trace

Array = npt.NDArray[Any]
CHUNK = 7  # tokens a piece, which divides no usual length
PADDING = 5  # more columns of it
Way = tuple[str, Array, Trace]
"""Its name, the rows that were fed so, and their trace."""


def fed_otherwise(runner: Runner, batch: Batch, whole: Trace) -> Iterator[Way]:
    """Every way, run when it is asked for.

    whole: what `runner` made of the batch with its tokens forced, prompt at once, then one by one.
    """
    tokens, steps = whole.tokens, whole.tokens.shape[1]
    every = np.arange(len(tokens))
    chunked = runner.run(batch, steps, tokens, chunk=CHUNK, keep_prefill=False)
    yield f"in pieces of {CHUNK} where the mask allows", every, chunked
    more = runner.run(_padded(batch), steps, tokens, keep_prefill=False)
    yield f"padded by {PADDING} more", every, more
    yield "in one call without a cache", every, _at_once(runner, batch, whole)
    for row in range(len(tokens)):
        trace = runner.run(alone(batch, row), steps, tokens[[row]], keep_prefill=False)
        yield "each alone", np.array([row]), trace


def same_however_fed(ways: Iterable[Way], whole: Trace, budgets: Budgets) -> list[Comparison]:
    """The largest difference of logits from `whole`, way by way; [] if no budget is declared."""
    if budgets.cache is None:
        return []
    band = budgets.margin_band.limit
    found: dict[str, list[Difference]] = {}
    for way, rows, trace in ways:
        mask = step_mask(whole)[rows] & ~_may_flip(whole, rows, trace, band)[:, None]
        apart = gap(whole.step_logits[rows], trace.step_logits)
        found.setdefault(way, []).append((way, mask, apart))
    return [
        largest("cache", f"logits, {way}", budgets.cache, differences)
        for way, differences in found.items()
    ]


def _may_flip(whole: Trace, rows: Array, trace: Trace, band: float) -> Array:
    """[rows] bool: decided otherwise, first by a score so near the threshold that rounding may."""
    if whole.guard_open is None or whole.guard_score is None or trace.guard_open is None:
        return np.zeros(len(rows), bool)
    width = min(whole.guard_open.shape[1], trace.guard_open.shape[1])
    real = token_mask(whole)[rows, -width:, None]
    differs = (whole.guard_open[rows, -width:] != trace.guard_open[:, -width:]) & real
    each = np.arange(len(rows))
    token = differs.any(axis=2).argmax(axis=1)
    gate = differs[each, token].argmax(axis=1)
    near = np.abs(whole.guard_score[rows, -width:][each, token, gate]) <= band
    return np.asarray(differs.any(axis=(1, 2)) & near)


def _padded(batch: Batch) -> Batch:
    """The same requests, each with more padding on its left: of a word, where no image is."""
    wide = ((0, 0), (PADDING, 0))
    word = batch.input_ids[:, -1:]
    return replace(
        batch,
        input_ids=np.concatenate([word] * PADDING + [batch.input_ids], axis=1),
        attention_mask=np.pad(batch.attention_mask, wide),
        image_mask=np.pad(batch.image_mask, wide),
    )


def _at_once(runner: Runner, batch: Batch, whole: Trace) -> Trace:
    """Prompt and answer in a single call; its logits where new tokens are chosen."""
    new = whole.tokens.shape[1] - 1
    # behind a row's end stand whatever tokens: none that asks for an image
    tokens = np.where(step_mask(whole), whole.tokens, batch.input_ids[:, -1:])
    zeros = np.zeros((len(tokens), new), bool)
    text = replace(
        batch,
        input_ids=np.concatenate([batch.input_ids, tokens[:, :-1]], axis=1),
        attention_mask=np.concatenate([batch.attention_mask, (~zeros).astype(np.int64)], axis=1),
        image_mask=np.concatenate([batch.image_mask, zeros], axis=1),
        answered=new,
    )
    trace = runner.run(text, 1, tokens[:, -1:])
    return replace(trace, tokens=whole.tokens, step_logits=trace.prefill_logits[:, -1 - new :])
