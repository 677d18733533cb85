"""Ablations by definition: hooks in the whole model, one ablation at a time.

This is what an ablation means, and what generates under one. `trace` gives the same scores for a
fraction of the work; nothing is shared with it but the words for what is ablated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from guardbake.batch import Batch
from guardbake.diagnose.ablation import ANSWER, Ablation, roles, same_place
from guardbake.diagnose.openings import Openings
from guardbake.vlm.load import Vlm
from guardbake.vlm.prompt import prepare
from guardbake.vlm.reference import on_output
from guardbake.vlm.runner import Session, decode, end_ids

Means = Sequence[tuple[Tensor, Tensor]]


@dataclass(frozen=True, eq=False)
class _Place:
    """Roles [B, S] of a call's tokens, and the donors' columns [B, S] in the same call."""

    roles: Tensor
    donors: Tensor


class AblatedBatch:
    """Prompts of one left-padded batch, to be run under ablations.

    batch: the first `size` requests are the prompts. "resample" needs as many donors after them,
    which run along unablated; without that, there need be none.
    """

    def __init__(self, vlm: Vlm, batch: Batch, size: int, means: Means) -> None:
        self._vlm, self._means, self._size = vlm, means, size
        self._columns = batch.input_ids.shape[1]
        self._session = Session(vlm, prepare(vlm, batch), None)
        self._prompt = _prompt_place(batch, size)
        self._now = self._prompt

    @torch.no_grad()
    def score(self, ablation: Ablation | None, openings: Openings) -> np.ndarray:
        """The refusal score [B] float64: every opening fed on its own after the prompt."""
        with self._under(ablation):
            first = self._session.feed(self._columns)[: self._size, -1:]
            sides = []
            for chosen in (openings.refusing, openings.compliant):
                each = [self._probability(first, opening) for opening in chosen]
                sides.append(torch.stack(each).logsumexp(0))
        return np.asarray((sides[0] - sides[1]).numpy())

    @torch.no_grad()
    def answers(self, ablation: Ablation | None, tokens: int) -> list[str]:
        """Greedy answers of at most `tokens` tokens of the B prompts."""
        ends = end_ids(self._vlm)
        with self._under(ablation):
            logits = self._session.logits(self._session.feed(self._columns)[:, -1])
            self._now = self._answering(1)
            ids, _ = decode(self._session, logits, tokens, None, ends, None)
        cut = [
            row[: next((i for i, token in enumerate(row) if token in ends), len(row))]
            for row in ids[: self._size].tolist()
        ]
        tokenizer: Any = self._vlm.processor.tokenizer
        return list(tokenizer.batch_decode(cut, skip_special_tokens=True))

    def _probability(self, first: Tensor, opening: tuple[int, ...]) -> Tensor:
        """log P(opening) [B] float64 after the prompt, whose last hidden state is `first`."""
        hidden = [first]
        if len(opening) > 1:
            self._now = self._answering(len(opening) - 1)
            fed = torch.tensor([opening[:-1]] * len(self._session.prompt.mask))
            hidden.append(self._session.step(fed)[: self._size])
            self._session.rewind(self._columns, None)
        log_p = self._session.logits(torch.cat(hidden, 1)).log_softmax(-1)
        return log_p[:, range(len(opening)), opening].double().sum(-1)

    @contextmanager
    def _under(self, ablation: Ablation | None) -> Iterator[None]:
        """From the prompt's first token, with the ablation's hooks while open."""
        self._session.rewind(0, None)
        self._now = self._prompt
        with ExitStack() as stack:
            for layer in () if ablation is None else {ablation.layer, ablation.last_layer}:
                assert ablation is not None
                for half in (0, 1):
                    if ablation.part != ("ffn", "attention")[half]:
                        path = self._vlm.family.layer_path(layer)
                        name = (self._vlm.family.attention, self._vlm.family.feed_forward)[half]
                        module = self._vlm.model.get_submodule(f"{path}.{name}")
                        stack.enter_context(on_output(module, self._replacer(ablation, half)))
            yield

    def _replacer(self, ablation: Ablation, half: int) -> Callable[[Tensor], Tensor]:
        def replace(out: Tensor) -> Tensor:
            own, donors = out[: self._size], out[self._size :]
            if ablation.kind == "resample":
                rows = torch.arange(self._size)[:, None]
                own = donors[rows, self._now.donors]
            elif ablation.kind == "mean":
                own = self._means[ablation.layer][half][self._now.roles]
            else:
                own = torch.zeros_like(own)
            return torch.cat([own, donors])

        return replace

    def _answering(self, tokens: int) -> _Place:
        """A call of `tokens` answer tokens."""
        shape = (self._size, tokens)
        return _Place(torch.full(shape, ANSWER), torch.arange(tokens).expand(shape))


def _prompt_place(batch: Batch, size: int) -> _Place:
    """Padding takes from the last column, where it does no harm."""
    rows, columns = batch.input_ids.shape
    starts = columns - batch.prompt_lengths
    role = np.zeros((size, columns), np.int64)
    place = np.full((size, columns), columns - 1)
    for row in range(size):
        own = batch.image_mask[row, starts[row] :]
        role[row, starts[row] :] = roles(own)
        if rows > size:
            other = batch.image_mask[size + row, starts[size + row] :]
            place[row, starts[row] :] = same_place(own, other) + starts[size + row]
    return _Place(torch.from_numpy(role), torch.from_numpy(place))
