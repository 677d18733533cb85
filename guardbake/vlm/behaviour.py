"""What the PyTorch model answers, guarded or not, to many prompts and under many guards.

A guard of profile `sequence` never edits a prompt token before the last, so the prompts' caches are
filled once and every guard goes on from there: the same answers for a fraction of the work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from guardbake.activations import Activations, Rows
from guardbake.errors import UsageError
from guardbake.plugins import first_end
from guardbake.samples import Sample
from guardbake.site import Site
from guardbake.spec import GuardSpec
from guardbake.vlm.capture import recorded
from guardbake.vlm.load import Vlm
from guardbake.vlm.requests import Asking, batches
from guardbake.vlm.runner import Session, decode, end_ids, greedy, prepare
from guardbake.vlm.sampling import Sampling

Progress = Callable[[int, int], None]
Array = npt.NDArray[Any]


class Drift(NamedTuple):
    """How far answers moved, one number a sample, [N].

    tokens: int64, tokens forced, the first end token included. surprise: sum over them of
    -ln p(token). divergence: sum over them of KL(undefended || defended), in nats.
    """

    tokens: Array
    surprise: Array
    divergence: Array


class Questions:
    """Prompts, prefilled up to their last token; ask them again and again."""

    @torch.no_grad()
    def __init__(
        self,
        vlm: Vlm,
        samples: Sequence[Sample],
        asking: Asking,
        batch_size: int,
        progress: Progress,
    ) -> None:
        self._vlm = vlm
        self._ends = end_ids(vlm)
        self._sessions: list[tuple[Session, Sequence[Sample]]] = []
        self.samples: list[Sample] = []
        for some, batch in batches(vlm, samples, asking, batch_size):
            session = Session(vlm, prepare(vlm, batch), None)
            session.feed(batch.input_ids.shape[1] - 1)
            self._sessions.append((session, some))
            self.samples += some
            progress(len(self.samples), len(samples))

    @torch.no_grad()
    def ask(
        self,
        spec: GuardSpec | None,
        tokens: int,
        progress: Progress,
        sampling: Sampling | None = None,
    ) -> list[str]:
        """Answers of at most `tokens` tokens, one a sample, in order; greedy without `sampling`."""
        answers: list[str] = []
        for session, some in self._sessions:
            pick = greedy if sampling is None else sampling.pick(some, tokens)
            with self._at_last_token(session, spec):
                first = session.logits(session.feed(_columns(session))[:, -1])
                ids, _ = decode(session, first, tokens, None, self._ends, None, pick)
            answers += self._texts(torch.from_numpy(ids))
            progress(len(answers), len(self.samples))
        return answers

    @torch.no_grad()
    def opens(self, spec: GuardSpec) -> list[bool]:
        """Whether the guard's gate is open at each prompt's last token, in order."""
        if spec.sensor is None:
            raise UsageError(
                found=f"a guard of profile {spec.profile}",
                expected="a guard with a sensor",
                where="the question whether its gate opens",
                remedy="use a gated guard",
            )
        opened: list[bool] = []
        for session, _ in self._sessions:
            with self._at_last_token(session, spec):
                session.feed(_columns(session))
                assert session.guard is not None
                assert session.guard.open is not None
                opened += session.guard.open[:, -1].tolist()
        return opened

    @torch.no_grad()
    def capture_last(self, sites: Sequence[Site]) -> Activations:
        """Rows at the last prompt token, unguarded. Image means are not taken here."""
        last: dict[Site, list[Rows]] = {site: [] for site in sites}
        for session, _ in self._sessions:
            columns = _columns(session)
            session.rewind(columns - 1, None)
            seen = recorded(self._vlm, sites, partial(session.feed, columns))
            for site, tensor in seen.items():
                last[site].append(tensor[:, -1].numpy())
        rows = {site: np.concatenate(parts) for site, parts in last.items()}
        return Activations(self.samples, rows, {})

    @torch.no_grad()
    def drift(
        self, undefended: Questions, spec: GuardSpec | None, tokens: int, progress: Progress
    ) -> Drift:
        """How far these prompts' answers under `spec` are from the undefended model's own.

        undefended: the same samples in the same batches, asked without any defence; may be `self`.
        Its greedy answers of at most `tokens` tokens are forced upon both.
        """
        parts: list[Drift] = []
        done = 0
        for (plain, _), (session, some) in zip(undefended._sessions, self._sessions, strict=True):
            with self._at_last_token(plain, None):
                first = plain.logits(plain.feed(_columns(plain))[:, -1])
                ids, own = decode(plain, first, tokens, None, self._ends, None)
            with self._at_last_token(session, spec):
                hidden = session.feed(_columns(session))[:, -1:]
                if ids.shape[1] > 1:
                    later = session.step(torch.from_numpy(ids[:, :-1]))
                    hidden = torch.cat([hidden, later], 1)
                logits = session.logits(hidden)
            parts.append(_drift(ids, torch.from_numpy(own), logits, self._ends))
            done += len(some)
            progress(done, len(self.samples))
        return Drift(*(np.concatenate(rows) for rows in zip(*parts, strict=True)))

    @contextmanager
    def _at_last_token(self, session: Session, spec: GuardSpec | None) -> Iterator[None]:
        """The session guarded by `spec`, its prompt fed up to where this guard may differ."""
        reusable = spec is None or spec.profile == "sequence"
        session.rewind(_columns(session) - 1 if reusable else 0, spec)
        try:
            with session.guarded():
                yield
        finally:
            if not reusable:  # the cache holds edited prompt tokens: fill it again
                session.rewind(0, None)
                session.feed(_columns(session) - 1)

    def _texts(self, ids: Tensor) -> list[str]:
        cut = []
        for row in ids.tolist():
            stop = next((i for i, token in enumerate(row) if token in self._ends), len(row))
            cut.append(row[:stop])
        return list(self._vlm.processor.tokenizer.batch_decode(cut, skip_special_tokens=True))


def _columns(session: Session) -> int:
    return session.prompt.mask.shape[1]


def _drift(ids: Array, own: Tensor, logits: Tensor, ends: frozenset[int]) -> Drift:
    """ids [B, n] forced; own, logits [B, n, V] of the undefended and of the defended model."""
    lengths = first_end(ids, ends)
    surprise, divergence = np.zeros(len(ids)), np.zeros(len(ids))
    for step in range(ids.shape[1]):  # step by step: [B, V] in float64 is large enough
        real = lengths > step
        before, after = (x[:, step].double().log_softmax(-1) for x in (own, logits))
        moved = (before.exp() * (before - after)).sum(-1).numpy()
        named = after.gather(-1, torch.from_numpy(ids[:, step : step + 1]))[:, 0].numpy()
        surprise += np.where(real, -named, 0)
        divergence += np.where(real, moved, 0)
    return Drift(lengths, surprise, divergence)
