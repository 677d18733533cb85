"""Turns that a model is made to say: how likely it finds them, with gradients where asked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from guardbake.samples import Sample
from guardbake.vlm.load import Vlm
from guardbake.vlm.runner import Session, end_ids

Ids = tuple[int, ...]


@dataclass(frozen=True)
class Exchange:
    """One request, and token ids of the turn that should answer it and of one that should not."""

    sample: Sample
    wanted: Ids
    unwanted: Ids


@dataclass(frozen=True, eq=False)
class Forced:
    """tokens [B, n] int64, padded at the end; real [B, n] bool, False at padding."""

    tokens: Tensor
    real: Tensor

    def surprise(self, session: Session) -> Tensor:
        """-ln p of every token after the session's whole prompt, [B, n] float32, 0 at padding.

        Feeds what the session has not been fed of its prompt, then the turns. The guard, and
        whatever else is to act, is the caller's to install.
        """
        hidden = session.feed(session.prompt.mask.shape[1])[:, -1:]
        if self.tokens.shape[1] > 1:
            hidden = torch.cat([hidden, session.step(self.tokens[:, :-1])], 1)
        logs = session.logits(hidden).log_softmax(-1)
        return -logs.gather(-1, self.tokens[..., None])[..., 0] * self.real


def forced(turns: Sequence[Ids]) -> Forced:
    """Turns of at least one token each, side by side."""
    length = max(len(turn) for turn in turns)
    tokens = torch.zeros(len(turns), length, dtype=torch.long)
    real = torch.zeros(len(turns), length, dtype=torch.bool)
    for row, turn in enumerate(turns):
        tokens[row, : len(turn)] = torch.tensor(turn)
        real[row, : len(turn)] = True
    return Forced(tokens, real)


def turn_ids(vlm: Vlm, text: str, ends: bool) -> Ids:
    """Token ids of an assistant turn, and if it `ends` the token that says so."""
    tokenizer: Any = vlm.processor.tokenizer
    ids = tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
    known = end_ids(vlm)
    own = tokenizer.eos_token_id
    return (*ids, own if own in known else min(known)) if ends else ids


def drawn(exchanges: Sequence[Exchange], count: int, seed: int) -> Iterator[list[Exchange]]:
    """Without end: `count` exchanges of each label there is, harmful first, each label shuffled
    anew whenever it is used up."""
    order = np.random.default_rng(seed)
    labels = sorted({exchange.sample.label for exchange in exchanges})
    sides = [[e for e in exchanges if e.sample.label == label] for label in labels]
    queues: list[list[Exchange]] = [[] for _ in sides]
    while True:
        batch = []
        for side, queue in zip(sides, queues, strict=True):
            while len(queue) < count:
                queue += [side[i] for i in order.permutation(len(side))]
            batch += [queue.pop(0) for _ in range(count)]
        yield batch
