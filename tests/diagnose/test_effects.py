"""Bootstrap intervals: what they cover, how they repeat, what they refuse."""

from __future__ import annotations

import numpy as np
import pytest

from guardbake.diagnose.effects import bootstrap
from guardbake.errors import MalformedError


def test_the_interval_holds_the_mean_and_is_that_of_the_normal_law() -> None:
    """The 95 % interval of a mean of 200 is 3.92 standard errors wide."""
    values = np.random.default_rng(0).standard_normal(200) + 3
    found = bootstrap(values, 4000, 0)
    assert found.low < found.value < found.high
    assert found.value == pytest.approx(values.mean())
    expected = 3.92 * values.std() / np.sqrt(200)
    assert found.high - found.low == pytest.approx(expected, rel=0.05)
    assert found.prompts == 200


def test_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    rng = np.random.default_rng(1)
    found = [bootstrap(rng.standard_normal(40), 400, 0) for _ in range(300)]
    held = np.mean([effect.low < 0 < effect.high for effect in found])
    assert 0.9 < held < 0.98  # a little below 0.95 with 40 numbers, as the method is


def test_a_seed_repeats_and_another_one_does_not() -> None:
    values = np.random.default_rng(0).standard_normal(30)
    assert bootstrap(values, 200, 5) == bootstrap(values, 200, 5)
    assert bootstrap(values, 200, 5) != bootstrap(values, 200, 6)
    shifted = bootstrap(values + 1, 200, 5)  # the same prompts redrawn
    assert shifted.low == pytest.approx(bootstrap(values, 200, 5).low + 1)


def test_other_prompts_are_taken_off_and_redrawn_apart() -> None:
    rng = np.random.default_rng(2)
    bad, good = rng.standard_normal(50) + 2, rng.standard_normal(70)
    found = bootstrap(bad, 4000, 0, good)
    assert found.value == pytest.approx(bad.mean() - good.mean())
    expected = 3.92 * np.sqrt(bad.var() / 50 + good.var() / 70)
    assert found.high - found.low == pytest.approx(expected, rel=0.06)
    with pytest.raises(MalformedError):
        bootstrap(bad, 100, 0, [])


def test_one_prompt_has_no_width() -> None:
    found = bootstrap([2.0], 100, 0)
    assert (found.low, found.value, found.high) == (2.0, 2.0, 2.0)
    assert found.to_json() == {"value": 2.0, "low": 2.0, "high": 2.0, "prompts": 1}


@pytest.mark.parametrize("values", [[], [1.0, np.nan], [[1.0]], [np.inf]])
def test_what_is_no_effect_is_refused(values: list[float]) -> None:
    with pytest.raises(MalformedError) as caught:
        bootstrap(values, 100, 0)
    assert caught.value.exit_code == 9
