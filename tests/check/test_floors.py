"""Half precision is held to multiples of the reference's own noise in it, never to less."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pytest

from guardbake.check.comparison import Budget, Budgets
from guardbake.check.floors import Standard, measure_floors, widened
from guardbake.check.parity import Pair, compare
from guardbake.errors import UnsupportedError
from guardbake.plugins import Trace

ROWS, PROMPT, STEPS, VOCAB = 3, 5, 4, 7
OWN = "a test's own"
SMALL, SQUARED = Budget(1e-6, OWN), Budget(1e-10, OWN)
BUDGETS = Budgets(
    *(SMALL,) * 4,
    law=Budget(1.0, OWN),
    cosine=SQUARED,
    norm_ratio=SMALL,
    kl=SQUARED,
    top1=SMALL,
    top5=SMALL,
    noise=Budget(4.0, "four times, says a test"),
    cache=SMALL,
)
NOISE = 2.0**-10


def _trace(noise: float = 0.0, seed: int = 1) -> Trace:
    """A guarded run; noise: how far off everything is, relative to its size of about 1."""
    rng, own = np.random.default_rng(seed), np.random.default_rng(0)
    fed = PROMPT + STEPS - 1

    def values(*shape: int) -> np.ndarray:
        off = 1 + noise * rng.uniform(-1, 1, shape)
        return np.asarray(own.standard_normal(shape) * off, np.float32)

    score = values(ROWS, fed, 1)
    taps = {name: values(ROWS, fed, 8) for name in ("reached/x", "edited/x")}
    prefill, step = values(ROWS, PROMPT, VOCAB), values(ROWS, STEPS, VOCAB)
    return Trace(
        tokens=np.argmax(step, axis=-1),
        prefill_logits=prefill,
        step_logits=step,
        lengths=np.full(ROWS, STEPS),
        valid=np.ones((ROWS, PROMPT), bool),
        guard_score=score,
        guard_open=np.zeros((ROWS, fed, 1), bool),
        guard_state=np.ones(ROWS, np.int64),
        taps=taps,
    )


@pytest.fixture(scope="module")
def standard() -> Standard:
    floors = measure_floors([("batch 0", _trace(), _trace(NOISE))])
    return Standard(BUDGETS, 1e-7, {"float16": floors})


def _broken(standard: Standard, got: Trace, free: Trace | None = None) -> set[str]:
    truth = _trace()
    far = replace(truth, step_logits=truth.step_logits + 9)
    budgets, noise = standard.budgets("float16"), standard.noise_in("float16")
    report = compare([Pair("batch 0", truth, got, free or got, far)], budgets, True, noise)
    return {row.gate for row in report.comparisons if not row.passed}


def test_what_rounds_like_the_reference_passes_and_in_float32_would_not(standard: Standard) -> None:
    rounded = _trace(NOISE, seed=2)
    assert _broken(standard, rounded) == set()
    report = compare([Pair("batch 0", _trace(), rounded, rounded, None)], BUDGETS, True, 1e-7)
    broken = {row.gate for row in report.comparisons if not row.passed}
    assert {"logits", "score", "ffn output", "cosine", "norm ratio", "kl", "noise"} <= broken


def test_an_error_ten_times_as_large_breaks_every_gate_of_numbers(standard: Standard) -> None:
    broken = _broken(standard, _trace(10 * NOISE, seed=2))
    assert {"logits", "score", "ffn output", "cosine", "norm ratio", "kl", "noise"} <= broken


def test_every_widened_budget_says_by_what(standard: Standard) -> None:
    wide = standard.budgets("float16")
    floors = standard.floors["float16"]
    for name in ("logits", "score", "ffn_output", "norm_ratio", "top1", "top5"):
        assert getattr(wide, name).limit == 4 * floors[name]
    for name in ("cosine", "kl"):
        assert getattr(wide, name).limit == 16 * floors[name]
    for name in ("logits", "kl", "top1"):
        assert "that float16 does to the reference itself; four times" in getattr(wide, name).source
    assert wide.cache == Budget(8 * floors["logits"], wide.cache.source if wide.cache else "")
    assert wide.margin_band.limit == wide.score.limit
    assert (wide.law, wide.noise) == (BUDGETS.law, BUDGETS.noise)
    assert floors["top1"] == 1 / (ROWS * STEPS)  # none differed, and of fewer nothing is known


def test_a_declared_budget_that_is_wider_stays() -> None:
    wide = widened(
        replace(BUDGETS, score=Budget(9.0, OWN), kl=None), {"score": 1.0, "kl": 1.0}, "x"
    )
    assert wide.score == Budget(9.0, OWN)
    assert wide.kl is None
    assert wide.margin_band.limit == 9.0


def test_float32_and_what_was_not_measured(standard: Standard) -> None:
    assert standard.budgets("float32") is BUDGETS
    assert standard.noise_in("float32") == 1e-7
    with pytest.raises(UnsupportedError, match=r"bfloat16.*one in float32, float16") as caught:
        standard.budgets("bfloat16")
    assert 'number = "bfloat16"' in caught.value.remedy
    bare = replace(standard, declared=replace(BUDGETS, noise=None))
    with pytest.raises(UnsupportedError):
        bare.budgets("float16")


def test_a_reference_that_overflows_is_no_measure(standard: Standard) -> None:
    far = _trace(NOISE)
    far.step_logits[0, 0, 0] = np.inf
    floors = measure_floors([("batch 0", _trace(), far)])
    assert floors["noise"] == np.inf
    with pytest.raises(UnsupportedError, match="overflows in float16"):
        replace(standard, floors={"float16": floors}).budgets("float16")


def test_rows_whose_gate_is_flipped_are_no_noise() -> None:
    rounded = _trace(NOISE)
    assert rounded.guard_open is not None
    opened = rounded.guard_open.copy()
    opened[0] = True
    elsewhere = rounded.step_logits.copy()
    elsewhere[0] += 9
    flipped = replace(rounded, guard_open=opened, step_logits=elsewhere)
    floors = measure_floors([("batch 0", _trace(), flipped)])
    assert max(floors["noise"], floors["logits"]) < 10 * NOISE


def test_a_floor_that_nothing_was_compared_for_widens_nothing() -> None:
    none = replace(_trace(), lengths=np.zeros(ROWS, np.int64), valid=np.zeros((ROWS, PROMPT), bool))
    floors = measure_floors([("batch 0", none, none)])
    wide = widened(BUDGETS, floors, "float16")
    for name in (field.name for field in fields(Budgets) if field.name in floors):
        assert getattr(wide, name) == getattr(BUDGETS, name)


def _choosing(apart: float) -> tuple[Trace, Trace]:
    """A reference whose best two logits at step 1 of row 0 are `apart`, and one that takes the
    other and goes on elsewhere."""
    truth = _trace()
    logits = truth.step_logits.copy()
    best = int(truth.tokens[0, 1])
    other = (best + 1) % VOCAB
    logits[0, 1, other] = logits[0, 1, best] - np.float32(apart)
    taken = truth.tokens.copy()
    taken[0, 1], taken[0, 2] = other, (taken[0, 2] + 1) % VOCAB
    truth = replace(truth, step_logits=logits)
    return truth, replace(truth, tokens=taken)


@pytest.mark.parametrize(("apart", "wrong"), [(0.5, 0), (1.5, 2)])
def test_only_a_tie_excuses_another_greedy_token(apart: float, wrong: int) -> None:
    truth, free = _choosing(apart)
    for ties, expected in ((1.0, wrong), (0.0, 2)):
        pair = Pair("batch 0", truth, truth, free, None)
        report = compare([pair], replace(BUDGETS, noise=None, ties=ties), True)
        (row,) = (row for row in report.comparisons if row.gate == "tokens")
        assert row.worst == expected


def test_a_row_that_stops_early_is_no_tie() -> None:
    truth = _trace()
    pair = Pair("batch 0", truth, truth, replace(truth, tokens=truth.tokens[:, :2]), None)
    report = compare([pair], replace(BUDGETS, noise=None, ties=1e9), True)
    (row,) = (row for row in report.comparisons if row.gate == "tokens")
    assert row.worst == ROWS * (STEPS - 2)
