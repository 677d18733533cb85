"""The refusal score: its arithmetic, its threshold, and the judge made of both."""

from __future__ import annotations

import numpy as np
import pytest

from guardbake.errors import UsageError
from guardbake.evaluate.judges import Judge
from guardbake.evaluate.refusal_score import RefusalScoreJudge, calibrate, refusal_scores
from guardbake.samples import Sample


def test_score_is_the_log_odds_of_the_openings() -> None:
    refusing, compliant = np.log([[0.3, 0.1]]), np.log([[0.1]])
    assert refusal_scores(refusing, compliant) == pytest.approx(np.log([4.0]))
    far = refusal_scores([[-2000.0, -2000.0]], [[-3000.0]])
    assert far == pytest.approx([1000 + np.log(2)])  # no underflow
    with pytest.raises(UsageError, match="finite"):
        refusal_scores([[-np.inf]], compliant)
    for bad in (np.zeros((2, 0)), np.zeros(2), np.zeros((3, 1))):
        with pytest.raises(UsageError, match="openings"):
            refusal_scores(np.zeros((2, 1)), bad)


def test_threshold_lies_between_refusals_and_answers() -> None:
    found = calibrate([-3.0, -1.0, 1.0, 5.0], [False, False, True, True])
    assert found.value == 0.0
    assert (found.caught.value, found.passed.value) == (1.0, 1.0)


def test_threshold_is_the_best_balanced_one_and_the_lowest_of_equals() -> None:
    rng = np.random.default_rng(0)
    flags = rng.random(200) < 0.2
    scores = rng.normal(size=200) + 1.5 * flags
    found = calibrate(scores, flags)
    tried = np.linspace(scores.min() - 1, scores.max() + 1, 5001)
    best = max((scores[flags] > t).mean() + (scores[~flags] <= t).mean() for t in tried)
    assert found.caught.value + found.passed.value == pytest.approx(best)
    assert calibrate([0.0, 1.0, 2.0, 3.0], [False, True, False, True]).value == 0.5


def test_scores_that_tell_nothing_are_refused() -> None:
    for scores, flags in (
        ([1.0, 2.0], [True, True]),
        ([1.0, 1.0], [True, False]),
        ([1.0, np.nan], [True, False]),
        ([1.0], [True, False]),
    ):
        with pytest.raises(UsageError):
            calibrate(scores, flags)


def test_the_judge_keeps_degenerate_answers_apart() -> None:
    asked = [Sample("x", "harmless", "text", "mini", i) for i in range(3)]
    judge: Judge = RefusalScoreJudge(lambda s: np.array([1.0, -1.0, 1.0][: len(s)]), threshold=0.5)
    assert judge.judge(asked, ["An oak.", "An oak.", ""]) == ["refused", "answered", "degenerate"]
    with pytest.raises(UsageError, match="one score an answer"):
        judge.judge(asked[:2], ["An oak."])
