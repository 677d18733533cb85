"""What the PyTorch model answers, guarded or not, to many prompts and under many guards.

A guard of profile `sequence` never edits a prompt token before the last, so the prompts' caches are
filled once and every guard goes on from there: the same answers for a fraction of the work.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from guardbake.errors import UsageError
from guardbake.plugins import first_end
from guardbake.samples import Sample
from guardbake.spec import GuardSpec, Sensor
from guardbake.vlm.load import Vlm
from guardbake.vlm.low_rank import LowRank, merged
from guardbake.vlm.prompt import prepare
from guardbake.vlm.requests import Asking, batches
from guardbake.vlm.runner import Session, decode, end_ids, greedy
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
    """Prompts, prefilled up to their last token; ask them again and again.

    change: what is done to the model's weights whenever it is asked, None for nothing.
    """

    @torch.no_grad()
    def __init__(
        self,
        vlm: Vlm,
        samples: Sequence[Sample],
        asking: Asking,
        batch_size: int,
        progress: Progress,
        change: LowRank | None = None,
    ) -> None:
        self._vlm = vlm
        self._change = change
        self._ends = end_ids(vlm)
        self._sessions: list[tuple[Session, Sequence[Sample]]] = []
        self._reads = ""
        self._memories: dict[Session, Tensor] = {}
        self._prefixes: dict[Session, GuardSpec | None] = {}
        self.samples: list[Sample] = []
        for some, batch in batches(vlm, samples, asking, batch_size):
            session = Session(vlm, prepare(vlm, batch), None)
            with merged(vlm, change):
                session.feed(session.resumes)
            self._sessions.append((session, some))
            self._prefixes[session] = None
            self.samples += some
            progress(len(self.samples), len(samples))

    @torch.no_grad()
    def ask(
        self,
        spec: GuardSpec | None,
        tokens: int,
        progress: Progress,
        sampling: Sampling | None = None,
        undefended: Sequence[str] | None = None,
    ) -> list[str]:
        """Answers of at most `tokens` tokens, one a sample, in order; greedy without `sampling`.

        undefended: what the same call without `spec` said. A guard of profile `sequence` whose gate
        stays closed says that again, so with it only prompts that open the gate are answered anew.
        """
        answers: list[str] = []
        for session, some in self._sessions:
            said = None if undefended is None else undefended[len(answers) :][: len(some)]
            if said is None or spec is None or spec.profile != "sequence":
                answers += self._answered(session, some, spec, tokens, sampling)
            else:
                answers += self._answered_anew(session, some, spec, tokens, sampling, said)
            progress(len(answers), len(self.samples))
        return answers

    def _answered(
        self,
        session: Session,
        some: Sequence[Sample],
        spec: GuardSpec | None,
        tokens: int,
        sampling: Sampling | None,
    ) -> list[str]:
        pick = greedy if sampling is None else sampling.pick(some, tokens)
        with self._at_last_token(session, spec):
            first = session.logits(session.feed(_columns(session))[:, -1])
            ids, _ = decode(session, first, tokens, None, self._ends, None, pick)
        return self._texts(torch.from_numpy(ids))

    def _answered_anew(
        self,
        session: Session,
        some: Sequence[Sample],
        spec: GuardSpec,
        tokens: int,
        sampling: Sampling | None,
        said: Sequence[str],
    ) -> list[str]:
        """`said`, but where the gate opens."""
        rows = [row for row, opens in enumerate(self._opens(session, spec)) if opens]
        answers = list(said)
        if rows:
            memory = self._memory(session, spec)
            session.rewind(session.resumes, None)
            few = session.rows(rows)
            self._prefixes[few] = None
            if memory is not None:
                self._memories[few] = memory[rows]
            texts = self._answered(few, [some[row] for row in rows], spec, tokens, sampling)
            self._memories.pop(few, None)
            del self._prefixes[few]
            for row, text in zip(rows, texts, strict=True):
                answers[row] = text
        return answers

    @torch.no_grad()
    def opens(self, spec: GuardSpec) -> list[bool]:
        """Whether any of the guard's gates is open at each prompt's last token, in order."""
        gated = _gated(spec)
        return [o for session, _ in self._sessions for o in self._opens(session, gated)]

    def _opens(self, session: Session, spec: GuardSpec) -> list[bool]:
        with self._at_last_token(session, spec):
            session.feed(_columns(session))
            assert session.guard is not None
            return [bool(o) for o in torch.stack(session.guard.opens)[..., -1].any(0)]

    @torch.no_grad()
    def scores(self, spec: GuardSpec) -> Array:
        """The guard's score at each prompt's last token, [N] float32: the largest of its gates'.

        Above 0 it opens a gate.
        """
        found: list[Array] = []
        for session, _ in self._sessions:
            with self._at_last_token(session, _gated(spec)):
                session.feed(_columns(session))
                assert session.guard is not None
                found.append(torch.stack(session.guard.scores)[..., -1].amax(0).float().numpy())
        return np.concatenate(found)

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
            with undefended._at_last_token(plain, None):
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
        """The session guarded by `spec`, its prompt fed up to the last token as this guard has it.

        Only guards of another profile than `sequence` edit earlier tokens: they get a cache of
        their own, which stays until another guard needs another.
        """
        prefix = None if spec is None or spec.profile == "sequence" else spec
        with merged(self._vlm, self._change):
            if self._prefixes[session] is not prefix:
                session.rewind(0, prefix)
                with session.guarded():
                    session.feed(session.resumes)
                self._prefixes[session] = prefix
            memory = self._memory(session, spec)
            session.rewind(session.resumes, spec, memory)
            with session.guarded():
                yield

    def _memory(self, session: Session, spec: GuardSpec | None) -> Tensor | None:
        """What the sensor remembers of the prompt before its last token; read once a sensor."""
        if spec is None or not spec.pools:
            return None
        reads = _reads(spec.sensors[0])
        if reads != self._reads:  # what is summed hangs on the readings alone, not on the guard
            self._reads, self._memories = reads, {}
        if session not in self._memories:
            session.rewind(0, spec)
            with session.guarded():
                session.feed(session.resumes)
            assert session.guard is not None
            self._memories[session] = session.guard.memory
        return self._memories[session]

    def _texts(self, ids: Tensor) -> list[str]:
        cut = []
        for row in ids.tolist():
            stop = next((i for i, token in enumerate(row) if token in self._ends), len(row))
            cut.append(row[:stop])
        return list(self._vlm.processor.tokenizer.batch_decode(cut, skip_special_tokens=True))


def _reads(sensor: Sensor) -> str:
    state = hashlib.sha256()
    for reading in sensor.readings:
        state.update(str(reading.site).encode())
        for array in (reading.directions, reading.centre):
            state.update(array.tobytes())
    return state.hexdigest()


def _gated(spec: GuardSpec) -> GuardSpec:
    if not spec.sensors:
        raise UsageError(
            found=f"a guard of profile {spec.profile}",
            expected="a guard with a sensor",
            where="the question whether its gate opens",
            remedy="use a gated guard",
        )
    return spec


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
