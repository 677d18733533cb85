"""The rule for layers: both curves count, ties are stated, and nothing is chosen from nothing."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guardbake.diagnose.choose import RULE, LayerChoice, choose_layers
from guardbake.diagnose.effects import Effect
from guardbake.errors import MalformedError

HIGH = st.floats(0.1, 9, allow_nan=False)


def cause(value: float, width: float = 0.05) -> Effect:
    return Effect(value, value - width, value + width, 8)


def choose(causes: list[Effect], distances: list[float], count: int) -> LayerChoice:
    """Where no ablation breaks the model."""
    return choose_layers(causes, [0.1] * len(causes), distances, 1.0, count)


def test_the_planted_layers_win() -> None:
    """Layer 2 is best by both curves, 4 second; 1 is a cause alone, 5 separates alone."""
    causes = [cause(v) for v in (0.1, 0.7, 0.9, 0.2, 0.8, -0.3)]
    found = choose(causes, [1.0, 0.5, 9.0, 2.0, 8.0, 99.0], 2)
    assert found.layers == (2, 4)
    assert [e.ranks for e in found.evidence] == [(5, 4), (3, 5), (1, 1), (4, 3), (2, 2), None]
    assert found.to_json()["rule"] == RULE


def test_an_interval_across_zero_is_not_admissible_however_it_separates() -> None:
    causes = [cause(0.5), cause(5.0, width=6.0), cause(0.4)]
    found = choose(causes, [1.0, 50.0, 2.0], 3)
    assert found.layers == (0, 2)
    assert found.evidence[1].ranks is None


def test_an_ablation_that_breaks_the_model_says_nothing_of_refusals() -> None:
    causes = [cause(9.0), cause(0.5), cause(0.4)]
    found = choose_layers(causes, [3.2, 1.0, 0.2], [9.0, 1.0, 2.0], 1.0, 3)
    assert found.layers == (1, 2)
    assert found.evidence[0].ranks is None
    assert found.evidence[0].divergence == 3.2
    assert choose_layers(causes[:1], [3.2], [9.0], 1.0, 1).layers == ()


def test_ties_go_to_the_larger_cause_and_then_to_the_earlier_layer() -> None:
    crossed = choose([cause(0.2), cause(0.3)], [2.0, 1.0], 1)
    assert crossed.layers == (1,)
    equal = choose([cause(0.3)] * 4, [1.0] * 4, 2)
    assert equal.layers == (0, 1)
    assert equal.evidence[3].ranks == (1, 1)


@given(st.lists(st.tuples(HIGH, HIGH), min_size=1, max_size=12), st.integers(1, 6))
def test_nothing_left_out_is_better_by_both_curves(
    curves: list[tuple[float, float]], count: int
) -> None:
    causes = [cause(value) for value, _ in curves]
    found = choose(causes, [distance for _, distance in curves], count)
    assert len(found.layers) == min(count, len(curves))
    for out in set(range(len(curves))) - set(found.layers):
        for chosen in found.layers:
            assert not all(a > b for a, b in zip(curves[out], curves[chosen], strict=True))


def test_no_cause_no_choice() -> None:
    found = choose([cause(-1.0), cause(0.01), cause(-0.5)], [1.0, 2.0, 3.0], 2)
    assert found.layers == ()
    assert [row.ranks for row in found.evidence] == [None, None, None]


@pytest.mark.parametrize("distances", [[1.0], [1.0, float("nan")]])
def test_curves_that_do_not_fit_are_refused(distances: list[float]) -> None:
    with pytest.raises(MalformedError) as caught:
        choose([cause(1.0), cause(1.0)], distances, 1)
    with pytest.raises(MalformedError):
        choose_layers([cause(1.0)], [float("nan")], [1.0], 1.0, 1)
    assert caught.value.exit_code == 9
