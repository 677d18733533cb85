"""What the PyTorch model answers, guarded or not, to many prompts and under many guards.

A guard of profile `sequence` never edits a prompt token before the last, so the prompts' caches are
filled once and every guard goes on from there: the same answers for a fraction of the work.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from guardbake.activations import Activations, Rows
from guardbake.samples import Sample
from guardbake.site import Site
from guardbake.spec import GuardSpec
from guardbake.vlm.capture import recorded
from guardbake.vlm.load import Vlm
from guardbake.vlm.requests import Typography, batches
from guardbake.vlm.runner import Session, decode, end_ids, prepare

Progress = Callable[[int, int], None]


class Questions:
    """Prompts, prefilled up to their last token; ask them again and again."""

    @torch.no_grad()
    def __init__(
        self,
        vlm: Vlm,
        samples: Sequence[Sample],
        typography: Typography,
        batch_size: int,
        progress: Progress,
    ) -> None:
        self._vlm = vlm
        self._ends = end_ids(vlm)
        self._sessions: list[Session] = []
        self.samples: list[Sample] = []
        for some, batch in batches(vlm, samples, typography, batch_size):
            session = Session(vlm, prepare(vlm, batch), None)
            session.feed(batch.input_ids.shape[1] - 1)
            self._sessions.append(session)
            self.samples += some
            progress(len(self.samples), len(samples))

    @torch.no_grad()
    def ask(self, spec: GuardSpec | None, tokens: int, progress: Progress) -> list[str]:
        """Greedy answers of at most `tokens` tokens, one a sample, in order."""
        answers: list[str] = []
        reusable = spec is None or spec.profile == "sequence"
        for session in self._sessions:
            columns = session.prompt.mask.shape[1]
            session.rewind(columns - 1 if reusable else 0, spec)
            with session.guarded():
                first = session.logits(session.feed(columns)[:, -1])
                ids, _ = decode(session, first, tokens, None, self._ends, None)
            if not reusable:
                self._refill(session)
            answers += self._texts(torch.from_numpy(ids))
            progress(len(answers), len(self.samples))
        return answers

    @torch.no_grad()
    def capture_last(self, sites: Sequence[Site]) -> Activations:
        """Rows at the last prompt token, unguarded. Image means are not taken here."""
        last: dict[Site, list[Rows]] = {site: [] for site in sites}
        for session in self._sessions:
            columns = session.prompt.mask.shape[1]
            session.rewind(columns - 1, None)
            seen = recorded(self._vlm, sites, partial(session.feed, columns))
            for site, tensor in seen.items():
                last[site].append(tensor[:, -1].numpy())
        rows = {site: np.concatenate(parts) for site, parts in last.items()}
        return Activations(self.samples, rows, {})

    def _refill(self, session: Session) -> None:
        """The cache holds edited prompt tokens: fill it again without a guard."""
        session.rewind(0, None)
        session.feed(session.prompt.mask.shape[1] - 1)

    def _texts(self, ids: Tensor) -> list[str]:
        cut = []
        for row in ids.tolist():
            stop = next((i for i, token in enumerate(row) if token in self._ends), len(row))
            cut.append(row[:stop])
        return list(self._vlm.processor.tokenizer.batch_decode(cut, skip_special_tokens=True))
