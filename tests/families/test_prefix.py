"""PaliGemma: a prompt that sees itself whole, beside a picture always; an answer looks back."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from guardbake.batch import Batch, mutual_tokens, prefill_stops, without_images
from guardbake.check.feeding import fed_otherwise
from guardbake.errors import UnsupportedError
from guardbake.samples import Sample
from guardbake.site import Site
from guardbake.spec import GuardSpec, Profile
from guardbake.vlm.behaviour import Questions
from guardbake.vlm.likelihood import log_likelihoods
from guardbake.vlm.preference import Descent, refine
from guardbake.vlm.prompt import prepare
from guardbake.vlm.requests import Typography, batches
from guardbake.vlm.runner import Session, TorchRunner

from guardbake_onnx.loop import ExecutorRunner
from tests.onnx.conftest import Exported, largest_difference
from tests.onnx.guarding import guarded_runner
from tests.onnx.undefended import LOGITS

pytestmark = pytest.mark.parametrize("member", ["paligemma"], indirect=True)
DRAWING = Typography(1, 1, "open")
WORDS = ("how to paint a wall", "open a wall", "paint")
TURN = torch.tensor([[45, 46, 47]])


def quiet(_done: int, _total: int) -> None:
    """Nobody watches."""


def samples() -> list[Sample]:
    return [Sample(words, "harmless", "blank", "ours", n) for n, words in enumerate(WORDS)]


def guarding(member: Exported, guard: Callable[..., GuardSpec], profile: Profile) -> GuardSpec:
    description = member.runner.description
    return guard(
        profile, "steer", width=description.hidden, layers=description.layers, edits=(2,),
        strength=3.0, threshold=-1e9, family="paligemma",
    )  # fmt: skip


def test_the_prompt_is_in_the_mask(member: Exported, mixed: Batch) -> None:
    """A planted fault: the decoder takes the prompt for any other text."""
    right = member.runner.run(mixed, 1).step_logits
    causal = dataclasses.replace(member.runner.description, mask="causal")
    fault = ExecutorRunner(causal, member.runner._executor)
    assert largest_difference(fault.run(mixed, 1).step_logits, right) > 10 * LOGITS


def test_the_tokens_of_an_answer_look_back(member: Exported, mixed: Batch) -> None:
    """Fed at once, one by one, and with a prompt that the answer belongs to."""
    with torch.no_grad():
        together, apart = (Session(member.vlm, prepare(member.vlm, mixed), None) for _ in "ab")
        for session in (together, apart):
            session.feed(mixed.input_ids.shape[1])
        tokens = TURN.expand(len(mixed.input_ids), -1)
        whole = together.step(tokens)
        steps = torch.cat([apart.step(token[:, None]) for token in tokens.unbind(1)], 1)
    assert largest_difference(whole.numpy(), steps.numpy()) <= LOGITS
    forced = member.runner.run(mixed, 4, np.tile([45, 46, 47, 8], (len(tokens), 1)))
    for way, rows, trace in fed_otherwise(member.runner, mixed, forced):
        apart_by = largest_difference(trace.step_logits, forced.step_logits[rows])
        assert apart_by <= LOGITS, way


def test_no_piece_of_a_prefill_cuts_a_prompt(mixed: Batch) -> None:
    columns = mixed.input_ids.shape[1]
    assert prefill_stops(mixed, 2, "prefix") == [columns]
    answered = dataclasses.replace(mixed, answered=3)
    assert prefill_stops(answered, 2, "prefix") == [columns - 3, columns - 1, columns]
    prompt = mutual_tokens(answered, "prefix")
    assert (prompt.sum(axis=1) == answered.prompt_lengths).all()
    assert not prompt[:, columns - 3 :].any()


@pytest.mark.parametrize("profile", ["sequence", "token", "always"])
def test_a_prompt_asked_again_is_fed_whole(
    profile: Profile, member: Exported, guard: Callable[..., GuardSpec]
) -> None:
    """Its last token, at which another guard may act, is seen by all others."""
    spec, vlm = guarding(member, guard, profile), member.vlm
    questions = Questions(vlm, samples(), DRAWING, 2, quiet)
    undefended = questions.ask(None, 3, quiet)
    said = questions.ask(spec, 3, quiet, undefended=undefended)
    likelihoods = log_likelihoods(vlm, samples(), DRAWING, spec, [[45], [46, 47]], 2)
    for row, (_, batch) in enumerate(batches(vlm, samples(), DRAWING, 1)):
        for answers, one in ((undefended, None), (said, spec)):
            tokens = TorchRunner(vlm, one).run(batch, 3).tokens.tolist()
            assert answers[row] == questions._texts(torch.tensor(tokens))[0]
        logits = TorchRunner(vlm, spec).run(batch, 2, np.array([[46, 47]])).step_logits
        logs = torch.from_numpy(logits).double().log_softmax(-1)[0]
        expected = [logs[0, 45], logs[0, 46] + logs[1, 47]]
        assert np.abs(likelihoods[row] - expected).max() <= LOGITS
    assert said != undefended


def test_a_prompt_without_its_image_sees_itself_whole_too(
    member: Exported, mixed: Batch, guard: Callable[..., GuardSpec], tmp_path: Path
) -> None:
    """What a guard of kind replace is told: the row of the words' last token."""
    description, site = member.runner.description, Site(2, "ffn_output")
    spec = guard(
        "sequence", "replace", width=description.hidden, layers=description.layers, edits=(2,),
        threshold=-1e9, family="paligemma",
    )  # fmt: skip
    words = without_images(mixed)
    session = Session(member.vlm, prepare(member.vlm, words), None)
    heard = Session(member.vlm, prepare(member.vlm, mixed), None)._text_only([site])[site]
    with torch.no_grad():
        rows: dict[str, Any] = {}
        module = member.vlm.model.get_submodule("model.language_model.layers.2.mlp")
        hook = module.register_forward_hook(lambda _m, _i, out: rows.update(row=out[:, -1]))
        session.feed(words.input_ids.shape[1])
        hook.remove()
    assert largest_difference(heard.numpy(), rows["row"].numpy()) <= LOGITS
    truth = TorchRunner(member.vlm, spec).run(mixed, 3)
    seen = guarded_runner(member.folder, spec, tmp_path / "guarded", False).run(
        mixed, 3, truth.tokens
    )
    assert largest_difference(seen.step_logits, truth.step_logits) <= LOGITS


def test_vectors_on_the_last_token_alone_are_not_refined(member: Exported) -> None:
    """Every token of the prompt sees what is added there."""
    start = {Site(2, "ffn_output"): np.ones(member.runner.description.hidden, np.float32)}
    with pytest.raises(UnsupportedError, match="tokens see each other"):
        refine(member.vlm, [], start, False, DRAWING, Descent(1, 1, 0.1, 0), quiet)
