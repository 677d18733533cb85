"""Parity catches what it is for: each planted difference breaks the comparison that owns it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from guardbake.check.comparison import Budget, Budgets
from guardbake.check.parity import Pair, ParityReport, compare
from guardbake.plugins import Trace

BUDGETS = Budgets(
    score=Budget(1e-3, "a test's own"),
    ffn_output=Budget(1e-3, "a test's own"),
    logits=Budget(1e-4, "a test's own"),
    margin_band=Budget(1e-2, "a test's own"),
)
ROWS, PROMPT, STEPS, VOCAB = 3, 5, 4, 7


def _trace() -> Trace:
    rng = np.random.default_rng(0)
    fed = PROMPT + STEPS - 1
    valid = np.ones((ROWS, PROMPT), bool)
    valid[1, :2] = False
    opened = np.zeros((ROWS, fed), bool)
    opened[0, PROMPT - 1 :] = True
    score = np.full((ROWS, fed), -1.0, np.float32)
    score[0, PROMPT - 1] = 2.0
    return Trace(
        tokens=rng.integers(0, VOCAB, (ROWS, STEPS)),
        prefill_logits=rng.standard_normal((ROWS, PROMPT, VOCAB)).astype(np.float32),
        step_logits=rng.standard_normal((ROWS, STEPS, VOCAB)).astype(np.float32),
        lengths=np.array([STEPS, STEPS, 2]),
        valid=valid,
        guard_score=score[..., None],
        guard_open=opened[..., None],
        guard_state=np.array([2, 1, 1]),
        taps={"edited/layers.1.ffn_output": np.zeros((ROWS, fed, 2), np.float32)},
    )


def _compare(forced: Trace, free: Trace | None = None, apart: float = 1.0) -> ParityReport:
    truth = _trace()
    undefended = replace(truth, step_logits=truth.step_logits + np.float32(apart))
    pair = Pair("batch 0", truth, forced, free or truth, undefended)
    return compare([pair], BUDGETS, gated=True)


def _broken(report: ParityReport) -> list[str]:
    return [c.quantity for c in report.comparisons if not c.passed]


def test_equal_runs_pass_and_everything_was_compared() -> None:
    report = _compare(_trace())
    assert report.passed
    assert all(c.compared > 0 for c in report.comparisons)
    assert report.decisions == ROWS
    assert report.margins["smallest"] == pytest.approx(1.0)


def _altered(field: str, place: tuple[int, ...], value: float) -> Trace:
    array = getattr(_trace(), field).copy()
    array[place] = value
    return replace(_trace(), **{field: array})


@pytest.mark.parametrize(
    ("forced", "owner"),
    [
        (_altered("prefill_logits", (0, 0, 0), 9.0), "logits, prefill"),
        (_altered("prefill_logits", (0, 0, 0), np.nan), "logits, prefill"),
        (_altered("step_logits", (0, 3, 0), np.inf), "logits, decode"),
        (_altered("guard_score", (1, 3, 0), -1.1), "guard score"),
        (_altered("guard_open", (1, 4, 0), True), "gate decisions outside the band"),
        (_altered("guard_state", (0,), 1), "guard_open unlike guard_state"),
    ],
)
def test_a_planted_difference_breaks_its_own_comparison(forced: Trace, owner: str) -> None:
    report = _compare(forced)
    assert not report.passed
    assert owner in _broken(report)


def test_a_tapped_ffn_output_is_compared() -> None:
    name = "edited/layers.1.ffn_output"
    wrong = _trace().taps[name].copy()
    wrong[0, 0, 0] = 2e-3
    report = _compare(replace(_trace(), taps={name: wrong}))
    assert _broken(report) == [f"FFN output, {name}"]


def test_padding_and_tokens_after_the_end_do_not_matter() -> None:
    padded = _altered("prefill_logits", (1, 0, 0), 9.0)
    ended = _altered("step_logits", (2, 3, 0), 9.0)
    assert _compare(padded).passed
    assert _compare(ended).passed


def test_a_greedy_token_that_differs_is_not_forgiven() -> None:
    tokens = _trace().tokens.copy()
    tokens[0, 1] += 1
    report = _compare(_trace(), free=replace(_trace(), tokens=tokens))
    assert _broken(report) == ["greedy tokens that differ"]


def test_a_flip_inside_the_band_is_counted_and_its_row_left_out() -> None:
    score = _trace().guard_score
    assert score is not None
    near = score.copy()
    near[1, PROMPT - 1] = -5e-3
    truth = replace(_trace(), guard_score=near)
    opened = _trace().guard_open
    assert opened is not None
    flipped = opened.copy()
    flipped[1, PROMPT - 1 :] = True
    forced = replace(
        truth,
        guard_open=flipped,
        guard_state=np.array([2, 2, 1]),
        step_logits=np.where(np.arange(ROWS)[:, None, None] == 1, 50, truth.step_logits),
    )
    report = compare([Pair("batch 0", truth, forced, None, None)], BUDGETS, gated=True)
    assert report.flips_in_band == 1
    assert _broken(report) == ["greedy tokens that differ"]  # nothing ran free: not a pass


def _two_gates(opened: np.ndarray, score: np.ndarray) -> Trace:
    """As before but of two gates: verdicts [B, 2] and scores [B, 2] at the prompt's end."""
    fed = PROMPT + STEPS - 1
    opens, scores = np.zeros((ROWS, fed, 2), bool), np.full((ROWS, fed, 2), -1.0, np.float32)
    opens[:, PROMPT - 1 :] = opened[:, None]
    scores[:, PROMPT - 1] = score
    state = 1 + opened @ np.array([1, 2])
    return replace(_trace(), guard_open=opens, guard_score=scores, guard_state=state)


FIRST = np.array([[True, False], [False, False], [False, True]])
SCORES = np.array([[2.0, -2.0], [-5e-3, -2.0], [-2.0, 2.0]])


def test_decisions_are_counted_gate_by_gate() -> None:
    truth = _two_gates(FIRST, SCORES)
    report = compare([Pair("batch 0", truth, truth, truth, None)], BUDGETS, gated=True)
    assert report.passed
    assert report.decisions == 2 * ROWS
    swapped = _two_gates(FIRST[:, ::-1], SCORES[:, ::-1])
    report = compare([Pair("batch 0", truth, swapped, truth, None)], BUDGETS, gated=True)
    assert {"guard score", "gate decisions outside the band"} <= set(_broken(report))


def test_a_state_without_the_second_gate_s_bit_is_found() -> None:
    truth = _two_gates(FIRST, SCORES)
    assert truth.guard_state is not None
    held = replace(truth, guard_state=np.minimum(truth.guard_state, 2))
    report = compare([Pair("batch 0", truth, held, truth, None)], BUDGETS, gated=True)
    assert _broken(report) == ["guard_open unlike guard_state"]


def test_behind_a_flip_inside_the_band_later_gates_are_not_judged() -> None:
    """Row 1: the first gate may flip; the second one then sees another stream. Row 0: it may not
    differ, for the first one did not."""
    truth, moved = _two_gates(FIRST, SCORES), SCORES.copy()
    opened = FIRST.copy()
    opened[1], moved[1] = [True, True], [5e-3, 7.0]
    flipped = _two_gates(opened, moved)
    report = compare([Pair("batch 0", truth, flipped, truth, None)], BUDGETS, gated=True)
    assert (report.flips_in_band, report.decisions) == (1, 2 * ROWS - 1)
    broken = [c.quantity for c in report.comparisons if not c.passed]
    assert broken == ["guard score"]  # the first gate's own 1e-2, beyond the score's budget
    moved[1, 0] = SCORES[1, 0]
    report = compare(
        [Pair("batch 0", truth, _two_gates(opened, moved), truth, None)], BUDGETS, gated=True
    )
    assert report.passed
    opened[0], opened[1] = [True, True], FIRST[1]
    report = compare(
        [Pair("batch 0", truth, _two_gates(opened, SCORES), truth, None)], BUDGETS, gated=True
    )
    assert _broken(report) == ["gate decisions outside the band"]


def test_a_test_that_cannot_tell_guarded_from_unguarded_fails() -> None:
    report = _compare(_trace(), apart=1e-3)
    assert _broken(report) == ["blindness to the guard"]


def test_a_candidate_without_a_gate_fails() -> None:
    bare = replace(_trace(), guard_open=None, guard_score=None, guard_state=None)
    assert "gate decisions outside the band" in _broken(_compare(bare))


def test_infinities_survive_as_text_in_json() -> None:
    report = _compare(_altered("prefill_logits", (0, 0, 0), np.nan)).to_json()
    worst = {row["quantity"]: row["worst"] for row in report["comparisons"]}
    assert worst["logits, prefill"] == "inf"
    assert report["passed"] is False


def test_the_histogram_counts_every_margin_once() -> None:
    found = _compare(_trace())
    counts = {str(each["above"]): each["decisions"] for each in found.histogram}
    assert sum(each or 0 for each in counts.values()) == found.decisions
    assert counts["1.0"] == found.decisions  # margins of 1 and 2


def test_what_has_no_budget_is_not_compared() -> None:
    gates = {c.gate for c in _compare(_trace()).comparisons}
    assert not gates & {"kl", "top-1", "top-5", "noise", "cosine", "norm ratio"}


def test_noise_that_was_not_measured_is_no_pass() -> None:
    budgets = replace(BUDGETS, noise=Budget(4.0, "a test's own"))
    pair = Pair("batch 0", _trace(), _trace(), _trace(), None)
    for floor, passes in ((None, False), (0.0, False), (1e-6, True)):
        report = compare([pair], budgets, True, floor)
        assert [c.passed for c in report.comparisons if c.gate == "noise"] == [passes]
