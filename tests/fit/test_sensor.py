"""The sensor is fitted where harm shows, and its threshold holds on every form."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from guardbake.errors import MalformedError
from guardbake.fit.sensor import fit_sensor
from guardbake.site import Site

PLANTED, WEAKER = Site(1, "residual"), Site(2, "ffn_output")


def fitted(made: Any, rate: float = 0.1, **strengths: Any) -> Any:
    where = strengths or {"planted": 6.0, "weaker": 2.0}
    planted = {PLANTED: where["planted"], WEAKER: where["weaker"]}
    return fit_sensor(
        made.activations(planted),
        made.activations(planted, seed=1),
        made.sites,
        (0.1, 1.0),
        rate,
    )


def test_the_planted_site_is_found(made: Any) -> None:
    sensor, report = fitted(made)
    assert sensor.site == report.site == PLANTED
    assert sensor.direction[0] > 0.95  # harm is positive, along the planted axis
    assert abs(sensor.direction[1]) < 0.2  # and not along what tells the forms apart
    assert report.cross_fitted > 0.95
    assert set(report.auc) == set(report.detection) == {"text", "typographic"}
    assert min(report.auc.values()) > 0.99


def test_the_site_follows_the_plant(made: Any) -> None:
    assert fitted(made, planted=2.0, weaker=6.0)[0].site == WEAKER


def test_the_earliest_of_equal_sites_is_taken(made: Any) -> None:
    """Everywhere perfectly apart: the first site is as good as any, and it is the one taken."""
    strengths = dict.fromkeys(made.sites, 200.0)
    sensor, report = fit_sensor(
        made.activations(strengths),
        made.activations(strengths, seed=1),
        made.sites[::-1],
        (0.1,),
        0.1,
    )
    assert report.cross_fitted == 1.0
    assert sensor.site == made.sites[0]


@pytest.mark.parametrize("rate", [0.05, 0.2])
def test_the_threshold_holds_on_each_form(made: Any, rate: float) -> None:
    sensor, report = fitted(made, rate)
    held_out = made.activations({PLANTED: 6.0, WEAKER: 2.0}, seed=1)
    scores = (held_out.last[PLANTED] - sensor.centre) @ sensor.direction - sensor.threshold
    for form in ("text", "typographic"):
        rows = held_out.where(lambda s, f=form: s.form == f)
        harmful = held_out.where(lambda s: s.label == "harmful")
        assert (scores[rows & ~harmful] > 1e-5).mean() <= rate  # 1e-5: float32 of the calibrated
        assert report.detection[form] == pytest.approx((scores[rows & harmful] > 0).mean())
        assert report.calibration.open_rate[form] <= rate
    assert max(report.calibration.open_rate.values()) > rate / 3  # not by never opening


def test_the_threshold_comes_from_the_held_out_prompts(made: Any) -> None:
    """Fitting prompts fit too well: 30 prompts in 12 dimensions."""
    planted = {PLANTED: 1.0}
    few = made.activations(planted, prompts=30, seed=2)
    sensor, _ = fit_sensor(few, made.activations(planted, seed=3), [PLANTED], (0.01,), 0.1)
    again, _ = fit_sensor(few, made.activations(planted, seed=4), [PLANTED], (0.01,), 0.1)
    assert sensor.direction.tobytes() == again.direction.tobytes()
    assert sensor.threshold != again.threshold


def test_too_few_harmless_prompts_are_refused(made: Any) -> None:
    with pytest.raises(MalformedError, match="at least 99"):
        fitted(made, 0.01)


def test_cross_fitting_sees_no_signal_in_noise(made: Any) -> None:
    """In 200 dimensions 40 rows of noise come apart perfectly, on the rows one looked at."""
    _, report = fit_sensor(
        made.activations({}, prompts=20, width=200),
        made.activations({}, prompts=20, width=200, seed=1),
        [PLANTED],
        (0.01,),
        0.1,
    )
    # 40 harmful rows at a rate of 0.1: deviation 0.05, four of them
    assert report.cross_fitted < 0.1 + 0.2


def test_the_same_activations_give_the_same_sensor(made: Any) -> None:
    first, second = fitted(made)[0], fitted(made)[0]
    assert first.direction.tobytes() == second.direction.tobytes()
    assert first.threshold == second.threshold
    assert np.array_equal(first.centre, second.centre)
