"""A threshold keeps the false-positive rate it promises, on scores it has not seen."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from guardbake.errors import MalformedError
from guardbake.fit.gate import calibrate, next_float32, upper_quantile


@pytest.mark.parametrize(("count", "rate"), [(60, 0.1), (25, 0.2), (199, 0.02)])
def test_fresh_exchangeable_scores_open_at_the_promised_rate(count: int, rate: float) -> None:
    """Exchangeable scores: the chance of a fresh one above the k-th of n is (n + 1 - k)/(n + 1)."""
    rng = np.random.default_rng(0)
    trials = 2000
    seen, fresh = rng.standard_gamma(0.5, (trials, count)), rng.standard_gamma(0.5, (trials, 500))
    limits = np.array([upper_quantile(row, rate) for row in seen])
    opened = (fresh > limits[:, None]).mean()
    exact = int(Fraction(rate).limit_denominator() * (count + 1)) / (count + 1)
    # the rate above a k-th smallest is beta distributed: deviation sqrt(rate / n) a trial, 4 sigma
    noise = 4 * np.sqrt(rate / count / trials)
    assert abs(opened - exact) < noise
    assert exact <= rate
    assert noise < rate / 10


@given(st.integers(1, 59), st.integers(1, 400))
def test_the_quantile_is_the_split_conformal_one(percent: int, count: int) -> None:
    """Against exact fractions, so that 0.18 of 150 is 27 and not a little less."""
    rank = -(-(count + 1) * (100 - percent) // 100)  # ceil
    scores = np.random.default_rng(count).permutation(count).astype(float)
    if rank > count:
        with pytest.raises(MalformedError):
            upper_quantile(scores, percent / 100)
    else:
        assert upper_quantile(scores, percent / 100) == rank - 1


@pytest.mark.parametrize(("rate", "needed"), [(0.1, 9), (0.05, 19), (0.02, 49), (0.01, 99)])
def test_too_few_samples_say_how_many_are_needed(rate: float, needed: int) -> None:
    upper_quantile(np.arange(needed), rate)
    with pytest.raises(MalformedError, match=f"at least {needed} ") as caught:
        upper_quantile(np.arange(needed - 1), rate)
    assert caught.value.found == f"{needed - 1} harmless samples"


def test_the_strictest_form_decides() -> None:
    scores = {"text": np.arange(20.0), "blank": np.arange(20.0) + 5, "typographic": np.zeros(20)}
    found = calibrate(scores, 0.1)
    assert found.threshold == next_float32(upper_quantile(scores["blank"], 0.1))
    assert found.open_rate == {"text": 0.0, "blank": 1 / 20, "typographic": 0.0}


def test_one_form_too_small_refuses_them_all() -> None:
    with pytest.raises(MalformedError):
        calibrate({"text": np.arange(50.0), "blank": np.arange(3.0)}, 0.1)


@pytest.mark.parametrize("value", [0.5, 0.1, 0.7, -0.7, -7.699399302384546, 3540.3084073208375])
def test_a_threshold_is_the_next_float32_however_its_last_digits_fell(value: float) -> None:
    found = next_float32(value)
    assert float(np.float32(found)) == found >= value
    assert float(np.nextafter(np.float32(found), np.float32(-np.inf))) < value
