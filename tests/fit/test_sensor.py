"""The sensor is fitted where harm shows, and its threshold holds on every form."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from guardbake import semantics as law
from guardbake.errors import MalformedError
from guardbake.fit.sensor import SensorPlan, fit_sensor
from guardbake.site import Site
from guardbake.spec import Sensor

PLANTED, WEAKER = Site(1, "residual"), Site(2, "ffn_output")


def plan(sites: Any, ridges: Any = (0.1, 1.0), rate: float = 0.1, **more: Any) -> SensorPlan:
    return SensorPlan(sites, more.pop("readings", 1), ridges, rate, **more)


def fitted(made: Any, rate: float = 0.1, **strengths: Any) -> Any:
    where = strengths or {"planted": 6.0, "weaker": 2.0}
    planted = {PLANTED: where["planted"], WEAKER: where["weaker"]}
    held_out = made.activations(planted, seed=1)
    return fit_sensor(made.activations(planted), held_out, plan(made.sites, rate=rate))


def scores(sensor: Sensor, rows: dict[Site, np.ndarray]) -> np.ndarray:
    """By the law, each row as a token."""
    features = law.features([rows[site][:, None] for site in sensor.sites], sensor.readings)
    return law.score(features, sensor.thresholds)[:, 0]


def test_the_planted_site_is_found(made: Any) -> None:
    sensor, report = fitted(made)
    assert sensor.sites == report.sites == (PLANTED,)
    direction = sensor.readings[0].directions[:, 0]
    direction = direction / np.linalg.norm(direction)
    assert direction[0] > 0.95  # harm is positive, along the planted axis
    assert abs(direction[1]) < 0.2  # and not along what tells the forms apart
    assert min(report.detection.values()) > 0.95
    assert report.tried == 2 * len(made.sites)
    assert set(report.auc) == set(report.detection) == {"text", "typographic"}
    assert min(report.auc.values()) > 0.99


def test_the_site_follows_the_plant(made: Any) -> None:
    assert fitted(made, planted=2.0, weaker=6.0)[0].sites == (WEAKER,)


def test_the_earliest_of_equal_sites_is_taken(made: Any) -> None:
    """Everywhere perfectly apart: the first site is as good as any, and it is the one taken."""
    strengths = dict.fromkeys(made.sites, 200.0)
    sensor, report = fit_sensor(
        made.activations(strengths),
        made.activations(strengths, seed=1),
        plan(made.sites[::-1], (0.1,), readings=3),
    )
    assert set(report.detection.values()) == {1.0}
    assert sensor.sites == (made.sites[0],)


def test_sites_that_know_more_together_are_read_together(made: Any) -> None:
    """Independent noise at each site: three weak views make a better one."""
    weak = dict.fromkeys(made.sites, 1.5)
    both = made.activations(weak, prompts=150), made.activations(weak, prompts=150, seed=1)
    alone = fit_sensor(*both, plan(made.sites, (1.0,)))[1]
    sensor, report = fit_sensor(*both, plan(made.sites, (1.0,), readings=6))
    assert len(sensor.sites) >= 4
    assert min(report.detection[f] - alone.detection[f] for f in alone.detection) > 0.1
    assert min(report.auc[f] - alone.auc[f] for f in alone.auc) > 0.05


@pytest.mark.parametrize("rate", [0.05, 0.2])
def test_the_threshold_holds_on_each_form(made: Any, rate: float) -> None:
    sensor, report = fitted(made, rate)
    held_out = made.activations({PLANTED: 6.0, WEAKER: 2.0}, seed=1)
    found = scores(sensor, held_out.last)
    for form in ("text", "typographic"):
        rows = held_out.where(lambda s, f=form: s.form == f)
        harmful = held_out.where(lambda s: s.label == "harmful")
        assert (found[rows & ~harmful] > 1e-5).mean() <= rate  # 1e-5: float32 of the calibrated
        assert report.detection[form] == pytest.approx((found[rows & harmful] > 0).mean())
        assert report.calibrations[0].open_rate[form] <= rate
    assert max(report.calibrations[0].open_rate.values()) > rate / 3  # not by never opening


def test_the_threshold_comes_from_the_held_out_prompts(made: Any) -> None:
    """Fitting prompts fit too well: 30 prompts in 12 dimensions."""
    planted = {PLANTED: 1.0}
    few = made.activations(planted, prompts=30, seed=2)
    one, other = (
        fit_sensor(few, made.activations(planted, seed=seed), plan([PLANTED], (0.01,)))[0]
        for seed in (3, 4)
    )
    assert one.readings[0].directions.tobytes() == other.readings[0].directions.tobytes()
    assert one.thresholds != other.thresholds


FORMS = ("text", "blank", "typographic")


def pooling(
    made: Any, seed: int, weights: tuple[float, ...], forms: tuple[str, ...] = FORMS
) -> Any:
    """Harm drawn in a picture shows in its tokens too."""
    planted = {PLANTED: 2.0}
    parts = []
    for number in (seed, seed + 1):
        made_up = made.activations(planted, forms=forms, seed=number)
        drawn = made_up.where(lambda s: s.form == "typographic")
        harmful = made_up.where(lambda s: s.label == "harmful")
        noise = np.random.default_rng(number).standard_normal((len(drawn), made.width))
        rows = made_up.image_mean[PLANTED]
        rows[:] = np.where(drawn[:, None], noise, 0.0)
        rows[drawn & harmful, 2] += 3.0
        rows[:, -1] += 9.0
        parts.append(made_up)
    return parts, fit_sensor(*parts, plan([PLANTED], pooling=weights))


@pytest.mark.parametrize("forms", [FORMS, FORMS[1:]])
def test_a_pooling_sensor_scores_by_the_law_what_it_was_calibrated_for(
    made: Any, forms: tuple[str, ...]
) -> None:
    """The fitted numbers, fed through the law token by token, give the report's figures; of a model
    that is never asked without a picture, too."""
    (_, held_out), (sensor, report) = pooling(made, 5, (0.0, 0.5, 1.0), forms)
    assert set(report.detection) == set(forms)
    assert report.pooling > 0
    assert sensor.sites == (PLANTED,)
    imageless = held_out.where(lambda s: s.form == "text")
    xs = []
    for site in sensor.sites:
        image = np.where(imageless[:, None], 0.0, held_out.image_mean[site])
        xs.append(np.stack([image, held_out.last[site]], axis=1))
    features = law.features(xs, sensor.readings)
    image = np.stack([~imageless, np.zeros_like(imageless)], axis=1)
    mask, nothing = np.ones(image.shape, np.int64), np.zeros((len(image), 3))
    found, _ = law.pooled_score(features, sensor.thresholds, mask, image, nothing)
    harmful = held_out.where(lambda s: s.label == "harmful")
    for form in forms:
        rows = held_out.where(lambda s, f=form: s.form == f)
        assert report.detection[form] == pytest.approx((found[rows & harmful, -1] > 0).mean())
        assert (found[rows & ~harmful, -1] > 1e-5).mean() <= 0.1


def test_pooling_is_taken_because_it_detects_more(made: Any) -> None:
    _, (_, without) = pooling(made, 5, (0.0,))
    _, (_, both) = pooling(made, 5, (0.0, 0.5, 1.0))
    assert without.pooling == 0.0
    assert both.detection["typographic"] > without.detection["typographic"] + 0.05


def test_forms_that_need_other_thresholds_are_levelled(made: Any) -> None:
    """Pictures without words say nothing of harm, and vary more: unlevelled they set the limit."""
    parts = [
        made.activations({PLANTED: 3.0}, forms=FORMS, seed=seed, prompts=99) for seed in (5, 6)
    ]
    for number, part in enumerate(parts):
        drawn = part.where(lambda s: s.form == "typographic")
        harmful = part.where(lambda s: s.label == "harmful")
        rows = part.image_mean[PLANTED]
        rows[:] = 3 * np.random.default_rng(number).standard_normal((len(drawn), made.width))
        rows[~drawn, 2] *= 3
        rows[drawn & harmful, 2] += 12.0
        rows[drawn, 3] += 40.0
    _, plain = fit_sensor(*parts, plan([PLANTED], (1.0,), rate=0.02))
    sensor, report = fit_sensor(*parts, plan([PLANTED], (1.0,), rate=0.02, pooling=(1.0,)))
    assert report.levelled
    assert report.tried == 2
    assert report.detection["typographic"] > plain.detection["typographic"] + 0.05
    assert report.detection["blank"] > plain.detection["blank"] - 0.05
    # along the axis that tells the forms apart the image tokens speak for drawn requests
    assert sensor.readings[0].directions[3, 1] > 0


def test_too_few_harmless_prompts_are_refused(made: Any) -> None:
    with pytest.raises(MalformedError, match="at least 99"):
        fitted(made, 0.01)


def test_noise_shows_no_signal(made: Any) -> None:
    """In 200 dimensions 40 rows of noise come apart perfectly, on the rows one looked at."""
    _, report = fit_sensor(
        made.activations({}, prompts=20, width=200),
        made.activations({}, prompts=60, width=200, seed=1),
        plan([PLANTED], (0.01,)),
    )
    # 60 harmful rows a form at a rate of 0.1: deviation 0.04, four of them
    assert max(report.detection.values()) < 0.1 + 0.16


def test_the_same_activations_give_the_same_sensor(made: Any) -> None:
    first, second = fitted(made)[0], fitted(made)[0]
    assert first.thresholds == second.thresholds
    for one, other in zip(first.readings, second.readings, strict=True):
        assert one.directions.tobytes() == other.directions.tobytes()
        assert one.centre.tobytes() == other.centre.tobytes()
