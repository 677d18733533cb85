"""Statistics against published numbers, closed forms and scipy."""

from __future__ import annotations

import json

import numpy as np
import pytest
from scipy.stats import binom, binomtest

from guardbake.errors import UsageError
from guardbake.evaluate.statistics import (
    Interval,
    Rate,
    bootstrap_mean,
    difference,
    holm,
    mcnemar_exact,
    pooled,
)


@pytest.mark.parametrize(("count", "total"), [(0, 20), (1, 7), (59, 128), (128, 128), (1, 1)])
def test_wilson_interval_agrees_with_scipy(count: int, total: int) -> None:
    reference = binomtest(count, total).proportion_ci(0.95, method="wilson")
    rate = Rate(count, total)
    assert rate.low == pytest.approx(reference.low, abs=1e-12)
    assert rate.high == pytest.approx(reference.high, abs=1e-12)
    assert rate.low <= rate.value <= rate.high


def test_wilson_interval_ends_exactly_at_the_edges() -> None:
    assert {Rate(0, total).low for total in range(1, 500)} == {0.0}
    assert {Rate(total, total).high for total in range(1, 500)} == {1.0}


def test_wilson_interval_of_a_published_example() -> None:
    # Newcombe 1998, Statistics in Medicine 17:857, table I: 81 of 263, score method.
    assert (round(Rate(81, 263).low, 4), round(Rate(81, 263).high, 4)) == (0.2553, 0.3662)


@pytest.mark.parametrize(("count", "total"), [(0, 0), (-1, 3), (4, 3)])
def test_impossible_rates_are_refused(count: int, total: int) -> None:
    with pytest.raises(UsageError):
        Rate(count, total)


@pytest.mark.parametrize(("first", "second"), [(0, 0), (0, 1), (3, 3), (2, 9), (40, 11)])
def test_mcnemar_agrees_with_the_binomial_test(first: int, second: int) -> None:
    pairs = first + second
    reference = binomtest(first, pairs).pvalue if pairs else 1.0
    assert mcnemar_exact(first, second) == pytest.approx(reference, rel=1e-12)
    assert mcnemar_exact(second, first) == mcnemar_exact(first, second)


def test_mcnemar_survives_large_counts_and_refuses_negative_ones() -> None:
    assert 0.0 <= mcnemar_exact(0, 2000) < 1e-300
    with pytest.raises(UsageError):
        mcnemar_exact(-1, 2)


@pytest.mark.parametrize(("count", "total"), [(7, 40), (30, 100), (99, 100)])
def test_bootstrap_of_flags_is_the_binomial_distribution(count: int, total: int) -> None:
    # Resampling flags draws from Binomial(n, p): its quantiles are known exactly.
    flags = np.arange(total) < count
    found = bootstrap_mean(flags, seed=1)
    exact = binom.ppf((0.025, 0.975), total, count / total) / total
    assert found.value == pytest.approx(count / total)
    assert (found.low, found.high) == pytest.approx(exact, abs=1.01 / total)
    assert bootstrap_mean(flags, seed=1) == found


def test_generations_of_one_prompt_narrow_nothing() -> None:
    once = np.arange(50) < 20
    one = pooled({"greedy": once}, seed=3)
    four = pooled({"greedy": once, **{f"seed {i}": once for i in range(3)}}, seed=3)
    assert four.over_runs == one.over_runs
    assert {str(rate) for rate in four.runs.values()} == {str(Rate(20, 50))}
    rng = np.random.default_rng(0)
    loose = {f"seed {i}": rng.permutation(once) for i in range(4)}
    free = pooled(loose, seed=3).over_runs
    assert free.high - free.low < 0.6 * (four.over_runs.high - four.over_runs.low)


def test_pooled_rate_that_never_varies_keeps_wilsons_width() -> None:
    never = np.zeros(30, bool)
    found = pooled({"greedy": never, "seed 0": never}, seed=0).over_runs
    assert found == Interval(0.0, Rate(0, 30).low, Rate(0, 30).high)
    assert found.high > 0.1


def test_difference_is_paired_and_signed() -> None:
    before = {"greedy": np.arange(60) < 12, "seed 0": np.arange(60) < 18}
    after = {"greedy": np.arange(60) < 42, "seed 0": np.arange(60) < 48}
    rise = difference(before, after, seed=0)
    assert rise.value == pytest.approx(0.5)
    assert 0.3 < rise.low < rise.value < rise.high < 0.7
    assert difference(after, before, seed=0).value == -rise.value
    assert difference(before, before, seed=0) == Interval(0.0, 0.0, 0.0)


def test_holm_agrees_with_p_adjust() -> None:
    # R 4.3: p.adjust(c(0.01, 0.04, 0.03, 0.005), "holm")
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []
    with pytest.raises(UsageError, match="outside"):
        holm([0.1, float("nan")])


def test_answers_that_cannot_be_paired_are_refused() -> None:
    for flags in ({}, {"greedy": []}, {"greedy": [True], "seed 0": [True, False]}):
        with pytest.raises(UsageError, match="every generation"):
            pooled(flags, seed=0)
    with pytest.raises(UsageError, match="same generations"):
        difference({"greedy": [True]}, {"seed 0": [True]}, seed=0)
    with pytest.raises(UsageError, match="every generation"):
        difference({"greedy": [True]}, {"greedy": [True, False]}, seed=0)
    with pytest.raises(UsageError, match="finite"):
        bootstrap_mean([0.0, float("nan")], seed=0)


def test_pooled_counts_go_into_json() -> None:
    document = json.loads(json.dumps(pooled({"greedy": [True, False]}, seed=0).to_json()))
    assert document["runs"]["greedy"]["count"] == 1
    assert set(document["over_runs"]) == {"value", "low", "high"}
