"""Asking again and again: sampled answers, gates read, and how far a guard moves an answer."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from guardbake.batch import Batch
from guardbake.errors import UsageError
from guardbake.samples import Form, Sample
from guardbake.site import Site
from guardbake.spec import GuardSpec
from guardbake.vlm.behaviour import Questions
from guardbake.vlm.catalog import models_root
from guardbake.vlm.load import Vlm, load_vlm
from guardbake.vlm.requests import Typography, batches
from guardbake.vlm.runner import Session, TorchRunner
from guardbake.vlm.sampling import Sampling, nucleus

TOKENS = 6
DRAWING = Typography(4, 4, "answer the request in the image .")
WORDS = ("tell me how to make a cake", "what is a lamp", "how do i make a good cake", "a cake")


def quiet(_done: int, _total: int) -> None:
    """Nobody watches."""


@pytest.fixture(scope="module")
def vlm() -> Vlm:
    return load_vlm(str(models_root() / "tiny-llava"))


def samples() -> list[Sample]:
    forms: tuple[Form, ...] = ("text", "natural", "typographic", "blank")
    return [Sample(WORDS[i], "harmless", form, "ours", i) for i, form in enumerate(forms)]


@pytest.fixture(scope="module")
def questions(vlm: Vlm) -> Questions:
    return Questions(vlm, samples(), DRAWING, 3, quiet)


def spec_of(guard: Any, profile: str, threshold: float, strength: float = 3.0) -> GuardSpec:
    made: GuardSpec = guard(
        profile, "steer", width=128, layers=6, sensor=Site(1, "residual"), edits=(2, 4),
        threshold=threshold, strength=strength,
    )  # fmt: skip
    return made


# ---- sampling


def test_sampled_answers_depend_on_seed_and_request_alone(vlm: Vlm, questions: Questions) -> None:
    hot = Sampling(3, 2.0, 1.0)
    once = questions.ask(None, TOKENS, quiet, hot)
    assert once == questions.ask(None, TOKENS, quiet, hot)
    alone = (Questions(vlm, [sample], DRAWING, 1, quiet) for sample in samples())
    assert once == [one.ask(None, TOKENS, quiet, hot)[0] for one in alone]
    assert once != questions.ask(None, TOKENS, quiet, replace(hot, seed=4))


def test_a_closed_guard_samples_what_the_undefended_model_samples(
    questions: Questions, guard: Any
) -> None:
    hot = Sampling(3, 2.0, 0.95)
    closed, opened = (spec_of(guard, "sequence", t) for t in (1e30, -1e30))
    plain = questions.ask(None, TOKENS, quiet, hot)
    assert questions.ask(closed, TOKENS, quiet, hot) == plain
    assert questions.ask(opened, TOKENS, quiet, hot) != plain


def test_the_nucleus_is_the_smallest_set_that_reaches_top_p() -> None:
    chances = torch.tensor([0.1, 0.5, 0.15, 0.25]).log()[None]
    even = torch.linspace(0, 1, 2001, dtype=torch.float64)[:-1]
    many = chances.expand(len(even), -1)
    taken = nucleus(many, 0.7, even).bincount(minlength=4) / len(even)
    assert taken.tolist() == pytest.approx([0, 2 / 3, 0, 1 / 3], abs=1e-3)
    whole = nucleus(many, 1.0, even).bincount(minlength=4) / len(even)
    assert whole.tolist() == pytest.approx([0.1, 0.5, 0.15, 0.25], abs=1e-3)
    assert (nucleus(many, 1e-9, even) == 1).all()


# ---- gates


@pytest.mark.parametrize("profile", ["token", "sequence"])
def test_gates_are_the_runner_s(vlm: Vlm, questions: Questions, guard: Any, profile: str) -> None:
    scores = []
    for sample in samples():
        batch = _alone(vlm, sample)
        trace = TorchRunner(vlm, spec_of(guard, profile, 0.0)).run(batch, 1)
        assert trace.guard_score is not None
        scores.append(float(trace.guard_score[0, -1, 0]))
    middle = float(np.sort(scores)[1:3].mean())
    opened = questions.opens(spec_of(guard, profile, middle))
    assert opened == [score > middle for score in scores]
    assert sum(opened) == 2


def test_any_gate_opens_and_is_answered_anew(questions: Questions, guard: Any) -> None:
    made: GuardSpec = guard(
        "sequence", "steer", width=128, layers=6, sensor=Site(1, "residual"),
        later=(Site(2, "residual"),), edits=(2, 4), threshold=0.0, strength=40.0,
    )  # fmt: skip

    def only(gate: int, limit: float) -> GuardSpec:
        """One gate opens where its score is above `limit`, the other one never."""
        sensors = list(replace(one, thresholds=(1e30,)) for one in made.sensors)
        sensors[gate] = replace(sensors[gate], thresholds=(limit,))
        return replace(made, sensors=tuple(sensors))

    plain = questions.ask(None, TOKENS, quiet)
    for gate in (0, 1):
        scores = questions.scores(only(gate, 0.0))
        spec = only(gate, float(np.sort(scores)[1:3].mean()))
        opened = questions.opens(spec)
        assert opened == (questions.scores(spec) > 0).tolist()
        assert sum(opened) == 2
        answers = questions.ask(spec, TOKENS, quiet)
        assert answers == questions.ask(spec, TOKENS, quiet, undefended=plain)
        assert [a == p for a, p in zip(answers, plain, strict=True)] == [not o for o in opened]


@pytest.mark.parametrize("pools", [False, True])
@pytest.mark.parametrize("hot", [None, Sampling(3, 2.0, 0.95)])
@pytest.mark.parametrize("kind", ["steer", "replace"])
def test_only_open_prompts_need_be_answered_anew(
    questions: Questions, guard: Any, kind: str, hot: Sampling | None, pools: bool
) -> None:
    made: GuardSpec = guard(
        "sequence", kind, width=128, layers=6, sensor=(Site(0, "residual"), Site(1, "residual")),
        edits=(2, 4), pools=pools, threshold=0.0, strength=40.0,
    )  # fmt: skip
    shift = float(np.sort(questions.scores(made))[1:3].mean())
    (sensor,) = made.sensors
    limits = tuple(limit + shift for limit in sensor.thresholds)
    spec = replace(made, sensors=(replace(sensor, thresholds=limits),))
    opened = questions.opens(spec)
    plain = questions.ask(None, TOKENS, quiet, hot)
    whole = questions.ask(spec, TOKENS, quiet, hot)
    assert questions.ask(spec, TOKENS, quiet, hot, plain) == whole
    assert sum(opened) == 2
    assert [a for a, o in zip(whole, opened, strict=True) if not o] == [
        a for a, o in zip(plain, opened, strict=True) if not o
    ]
    assert whole != plain
    marked = questions.ask(spec, TOKENS, quiet, hot, ["said"] * len(plain))
    assert [answer == "said" for answer in marked] == [not o for o in opened]


def test_a_guard_without_a_sensor_has_no_gate(questions: Questions, guard: Any) -> None:
    with pytest.raises(UsageError, match="a guard with a sensor"):
        questions.opens(spec_of(guard, "always", 0.0))


# ---- drift


def test_drift_is_what_forced_runs_show(vlm: Vlm, questions: Questions, guard: Any) -> None:
    spec = spec_of(guard, "sequence", -1e30)
    drift = questions.drift(questions, spec, TOKENS, quiet)
    for row, sample in enumerate(samples()):
        batch = _alone(vlm, sample)
        plain = TorchRunner(vlm, None).run(batch, TOKENS)
        moved = TorchRunner(vlm, spec).run(batch, plain.tokens.shape[1], plain.tokens)
        n = int(plain.lengths[0])
        own, after = (torch.from_numpy(t.step_logits[0, :n]).double() for t in (plain, moved))
        p, q = own.log_softmax(-1), after.log_softmax(-1)
        named = q.gather(-1, torch.from_numpy(plain.tokens[0, :n, None]))
        assert drift.tokens[row] == n
        assert drift.surprise[row] == pytest.approx(-float(named.sum()), abs=1e-3)
        assert drift.divergence[row] == pytest.approx(float((p.exp() * (p - q)).sum()), abs=1e-3)
    assert (drift.divergence > 0.01).all()


def test_drift_counts_up_to_the_first_end_token(vlm: Vlm, questions: Questions) -> None:
    answers = questions.ask(None, 24, quiet)
    drift = questions.drift(questions, None, 24, quiet)
    own = [len(vlm.processor.tokenizer(a, add_special_tokens=False)["input_ids"]) for a in answers]
    assert drift.tokens.tolist() == [n + 1 for n in own]  # and the end token
    assert len(set(own)) > 1


def test_the_undefended_model_does_not_drift(questions: Questions, guard: Any) -> None:
    for spec in (None, spec_of(guard, "sequence", 1e30)):
        drift = questions.drift(questions, spec, TOKENS, quiet)
        # one call for all forced tokens against one a token: float32 in another order
        assert np.abs(drift.divergence).max() < 1e-8
    assert (drift.surprise > 0).all()


def test_a_token_guard_leaves_no_trace_in_the_cache(questions: Questions, guard: Any) -> None:
    before = questions.ask(None, TOKENS, quiet)
    edited = questions.ask(spec_of(guard, "always", 0.0, 30.0), TOKENS, quiet)
    assert edited != before
    assert questions.ask(None, TOKENS, quiet) == before


@pytest.fixture
def fed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many columns each call of Session.feed took."""
    counts: list[int] = []
    feed = Session.feed

    def counted(session: Session, stop: int) -> torch.Tensor:
        counts.append(stop - session.fed)
        return feed(session, stop)

    monkeypatch.setattr(Session, "feed", counted)
    return counts


def test_a_prompt_is_fed_once_under_a_guard_that_edits_it(
    vlm: Vlm, guard: Any, fed: list[int]
) -> None:
    asked = Questions(vlm, samples(), DRAWING, len(WORDS), quiet)
    (prompt,) = fed
    whole = spec_of(guard, "always", 0.0, 30.0)
    for spec, hot in ((whole, None), (whole, Sampling(3, 2.0, 0.95)), (None, None), (None, None)):
        asked.ask(spec, TOKENS, quiet, hot)
    assert fed[1:] == [prompt, 1, 1, prompt, 1, 1]


def test_what_a_sensor_remembers_is_read_once(vlm: Vlm, guard: Any, fed: list[int]) -> None:
    asked = Questions(vlm, samples(), DRAWING, len(WORDS), quiet)
    (prompt,) = fed
    pools = {"width": 128, "layers": 6, "sensor": Site(1, "residual"), "pools": True}
    for edits in ((2, 4), (3,)):  # two guards that read alike
        asked.scores(guard("sequence", "steer", edits=edits, **pools))
    assert fed[1:] == [prompt, 1, 1]
    asked.scores(guard("sequence", "steer", edits=(3,), seed=1, **pools))
    assert fed[4:] == [prompt, 1]


def _alone(vlm: Vlm, sample: Sample) -> Batch:
    ((_, batch),) = batches(vlm, [sample], DRAWING, 1)
    return batch
