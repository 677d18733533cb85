"""Arms: the rivals of one table, each a way to defend the same model, asked the same questions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from guardbake.errors import UsageError
from guardbake.samples import Sample
from guardbake.samples.typography import Tokenizer
from guardbake.spec import GuardSpec
from guardbake.vlm.behaviour import Drift, Progress, Questions
from guardbake.vlm.low_rank import LowRank
from guardbake.vlm.requests import Asking
from guardbake.vlm.sampling import Sampling
from guardbake.vlm.tokens import Request

UNDEFENDED = "undefended"


@dataclass(frozen=True, eq=False)
class Arm:
    """One defence.

    spec: the guard, or None. canned: what is said instead whenever the guard's gate is open at the
    prompt's last token, its edits unused (gate-only refusal). preamble: a sentence put before every
    request's text ("" for none). tuned: a change of the model's weights, which is no guard and with
    which none is combined. Without all four: the undefended model.
    Raises UsageError for a canned answer without a sensor that could ask for it, and for a guard on
    a changed model, which it was not fitted for.
    """

    name: str
    spec: GuardSpec | None = None
    canned: str | None = None
    preamble: str = ""
    tuned: LowRank | None = None

    def __post_init__(self) -> None:
        if self.spec is not None and self.tuned is not None:
            raise UsageError(
                found="a guard on a fine-tuned model",
                expected="one or the other",
                where=f"arm {self.name!r}",
                remedy="make two arms of it",
            )
        if self.canned is not None and (self.spec is None or not self.spec.sensors):
            raise UsageError(
                found="a canned answer without a gate",
                expected="a guard with a sensor",
                where=f"arm {self.name!r}",
                remedy="name a gated guard for it",
            )

    @property
    def key(self) -> dict[str, str | None]:
        """What the arm does, without names and provenance: equal keys, equal answers."""
        guard = None if self.spec is None else replace(self.spec, provenance={}).digest
        return {
            "guard": guard,
            "canned": self.canned,
            "preamble": self.preamble,
            "tuned": None if self.tuned is None else self.tuned.digest,
        }

    @property
    def record(self) -> dict[str, str | None]:
        """The arm as an evaluation lists it: its name, and its guard as the pack's digest."""
        return {
            **self.key,
            "name": self.name,
            "guard": None if self.spec is None else self.spec.digest,
        }

    @property
    def edits(self) -> GuardSpec | None:
        """The guard whose edits the model runs under, None if the arm edits nothing."""
        return None if self.canned is not None else self.spec

    def asking(self, asking: Asking) -> Asking:
        """The same requests as this arm's model gets them."""
        return _Preambled(asking, self.preamble) if self.preamble else asking

    def answers(
        self,
        questions: Questions,
        tokens: int,
        sampling: Sampling | None,
        plain: Callable[[], Sequence[str]],
        progress: Progress,
    ) -> list[str]:
        """One answer a sample. questions: asked through `asking`; plain: what the model answers
        without its guard to the same, called only if the arm has one."""
        if self.spec is None:
            return questions.ask(None, tokens, progress, sampling)
        if self.canned is None:
            return questions.ask(self.spec, tokens, progress, sampling, plain())
        opened = questions.opens(self.spec)
        return [self.canned if o else p for o, p in zip(opened, plain(), strict=True)]

    def drift(
        self, questions: Questions, undefended: Questions, tokens: int, progress: Progress
    ) -> Drift | None:
        """See `Questions.drift`; None for a canned answer, which has no distribution."""
        if self.canned is not None:
            return None
        return questions.drift(undefended, self.spec, tokens, progress)


@dataclass(frozen=True)
class _Preambled:
    inner: Asking
    preamble: str

    def request(self, sample: Sample, tokenizer: Tokenizer) -> Request:
        text, image = self.inner.request(sample, tokenizer)
        return f"{self.preamble} {text}", image
