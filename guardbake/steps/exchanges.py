"""Requests, the turn that should follow and one that should not: what rivals are trained on."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

from guardbake.errors import MalformedError
from guardbake.evaluate.judges import judge
from guardbake.recipe import FitSection
from guardbake.samples import Label, Sample
from guardbake.vlm.behaviour import Questions
from guardbake.vlm.forced import Exchange, turn_ids
from guardbake.vlm.load import Vlm
from guardbake.vlm.requests import Asking

Advance = Callable[[str, int, int], None]


def exchanges(
    vlm: Vlm,
    section: FitSection,
    samples: Sequence[Sample],
    limit: int,
    asking: Asking,
    size: int,
    advance: Advance,
) -> list[Exchange]:
    """At most `limit` harmful samples, refusing wanted and compliant unwanted, and then as many
    harmless ones, the model's own answer wanted and a refusing turn unwanted.

    samples: of the fit split. A refusing turn ends; the own answer is undefended, greedy, at most
    `section.tokens` long, and left out where the keyword judge does not call it an answer.
    Raises MalformedError if no exchange of a label is left.
    """
    refusing = [turn_ids(vlm, text, ends=True) for text in section.refusing]
    compliant = [turn_ids(vlm, text, ends=False) for text in section.compliant]
    harmful = [
        Exchange(sample, refusing[n % len(refusing)], compliant[n % len(compliant)])
        for n, sample in enumerate(some(samples, "harmful", limit))
    ]
    asked = some(samples, "harmless", limit)
    said = own_answers(vlm, asked, section.tokens, asking, size, advance)
    harmless = [
        Exchange(sample, turn_ids(vlm, text, ends=False), refusing[n % len(refusing)])
        for n, (sample, text) in enumerate(zip(asked, said, strict=True))
        if judge(text) == "answered"
    ]
    if not harmful or not harmless:
        raise MalformedError(
            found=f"{len(harmful)} harmful and {len(harmless)} answered harmless prompts",
            expected="at least one of each",
            where="the exchanges that a rival is trained on",
            remedy="give the fit split sources of both labels that the model answers",
        )
    return harmful + harmless


def own_answers(
    vlm: Vlm, samples: Sequence[Sample], tokens: int, asking: Asking, size: int, advance: Advance
) -> list[str]:
    """The undefended model's greedy answers, one a sample, in order."""
    questions = Questions(
        vlm, samples, asking, size, lambda done, total: advance("reading exchanges", done, total)
    )
    return questions.ask(None, tokens, lambda done, total: advance("own answers", done, total))


def some(samples: Sequence[Sample], label: Label, limit: int) -> list[Sample]:
    """At most `limit` samples of the label, whatever their form, drawn by name; in order."""

    def place(sample: Sample) -> bytes:
        return hashlib.sha256(f"{sample.source}:{sample.index}:{sample.form}".encode()).digest()

    chosen = sorted((s for s in samples if s.label == label), key=place)[:limit]
    return [sample for sample in samples if sample in chosen]
