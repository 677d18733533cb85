"""Thresholds for another graph: the old rule on new scores."""

from __future__ import annotations

import numpy as np
import pytest

from guardbake import semantics as law
from guardbake.activations import Activations
from guardbake.errors import MalformedError
from guardbake.fit.recalibrate import recalibrated, reference_scores
from guardbake.samples import Form, Label, Sample
from guardbake.site import Site
from guardbake.spec import Reading, Sensor

FORMS: tuple[Form, ...] = ("blank", "text", "typographic")
COUNT, WIDTH, RATE = 40, 6, 0.1
SITES = Site(1, "residual"), Site(3, "residual")


def samples() -> list[Sample]:
    labels: tuple[Label, ...] = ("harmful", "harmless")
    return [
        Sample(f"{label} {number}", label, form, "made", number)
        for label in labels
        for number in range(COUNT)
        for form in FORMS
    ]


def sensor(pools: bool) -> Sensor:
    rng = np.random.default_rng(3)
    shape = (WIDTH, 1 + pools)
    readings = tuple(
        Reading(site, *(rng.standard_normal(s).astype(np.float32) for s in (shape, WIDTH)))
        for site in SITES
    )
    return Sensor(readings, (0.5, 1.0, 2.0) if pools else (0.5,))


def drawn(seed: int) -> np.ndarray:
    """Scores [N]: of harmful prompts 3 above those of harmless ones."""
    rng = np.random.default_rng(seed)
    above = np.array([3.0 * (sample.label == "harmful") for sample in samples()])
    return rng.standard_normal(len(above)) + above - 1.5


@pytest.mark.parametrize("pools", [False, True])
def test_the_rate_is_kept_in_every_form(pools: bool) -> None:
    reference = drawn(0)
    louder = reference * 2 + 1.0  # another graph, in which every gate opens too easily
    moved, shifts = recalibrated(sensor(pools), samples(), louder, reference, RATE)
    assert list(shifts) == sorted(FORMS)
    for shift in shifts.values():
        assert (shift.harmless, shift.harmful) == (COUNT, COUNT)
        assert shift.harmless_open[1] > RATE >= shift.harmless_open[2]
        assert shift.harmful_open[2] > 0.5
    strictest = max(shift.harmless_open[2] for shift in shifts.values())
    assert strictest >= RATE - 2 / COUNT  # no stricter than the rule asks for
    assert all(
        new > old for new, old in zip(moved.thresholds, sensor(pools).thresholds, strict=True)
    )


def test_a_form_on_its_own_moves_its_own_threshold() -> None:
    reference = drawn(1)
    text = np.array([sample.form == "text" for sample in samples()])
    first, _ = recalibrated(sensor(True), samples(), reference, reference, RATE)
    again, shifts = recalibrated(sensor(True), samples(), reference + 2.0 * text, reference, RATE)
    assert again.thresholds[0] == pytest.approx(first.thresholds[0] + 2.0, abs=1e-6)
    assert again.thresholds[1:] == first.thresholds[1:]
    assert shifts["text"].shift == pytest.approx((2.0, 0.0, 2.0))
    assert shifts["blank"].shift == (0.0, 0.0, 0.0)


def test_what_image_tokens_must_accuse_by_stays() -> None:
    """The mean counts from thresholds[2] - thresholds[1] on, which is of the directions."""
    before = sensor(True)
    after, _ = recalibrated(before, samples(), drawn(2) + 5.0, drawn(2), RATE)
    lift = after.thresholds[2] - after.thresholds[1]
    assert lift == pytest.approx(before.thresholds[2] - before.thresholds[1], abs=1e-6)


def test_a_moved_threshold_moves_the_laws_scores_as_it_says() -> None:
    before, reference = sensor(False), drawn(4)
    after, shifts = recalibrated(before, samples(), reference, reference, RATE)
    features = (reference + before.thresholds[0])[:, None, None]
    opened = law.is_open(law.score(features, after.thresholds))[:, 0]
    for form, shift in shifts.items():
        chosen = [s.form == form and s.label == "harmful" for s in samples()]
        assert opened[chosen].mean() == shift.harmful_open[2]


@pytest.mark.parametrize("pools", [False, True])
def test_reference_scores_are_the_laws(pools: bool) -> None:
    """A request of one image token and a last word; one without an image."""
    rng = np.random.default_rng(5)
    asked = samples()
    last, image = (
        {site: rng.standard_normal((len(asked), WIDTH)).astype(np.float32) for site in SITES}
        for _ in range(2)
    )
    for rows in image.values():
        rows[[sample.form == "text" for sample in asked]] = np.nan
    found = reference_scores(sensor(pools), Activations(asked, last, image))
    for row, sample in enumerate(asked):
        shown = np.array([[sample.form != "text", False]])
        xs = [np.nan_to_num(np.stack([image[s][row], last[s][row]])[None]) for s in SITES]
        features = law.features([x.astype(np.float64) for x in xs], sensor(pools).readings)
        thresholds, mask = sensor(pools).thresholds, np.ones((1, 2), np.int64)
        if pools:
            memory = np.zeros((1, 3))
            scores, _ = law.pooled_score(features, thresholds, mask, shown, memory)
        else:
            scores = law.score(features, thresholds)
        assert found[row] == pytest.approx(scores[0, -1], abs=1e-9)


def test_bad_scores_are_refused() -> None:
    scores = drawn(6)
    with pytest.raises(MalformedError, match="expected at least 99"):
        recalibrated(sensor(False), samples(), scores, scores, 0.01)
    scores[7] = np.nan
    with pytest.raises(MalformedError, match="1 scores of 240 that are not finite"):
        recalibrated(sensor(False), samples(), scores, drawn(6), RATE)
