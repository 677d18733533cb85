"""Each measure is its definition, and sites are judged by what separates fresh prompts."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.distance import cdist
from scipy.stats import mannwhitneyu

from guardbake.activations import Activations, Rows
from guardbake.covariance import Ridge, shrinkage
from guardbake.diagnose.separability import (
    area_under_curve,
    folds,
    mahalanobis,
    scatter_ratio,
    separability,
    silhouette,
)
from guardbake.errors import MalformedError
from guardbake.samples import FORMS, Form, Sample
from guardbake.site import Site

SCORES = st.lists(st.integers(-3, 3), min_size=1, max_size=30)
SEEDS = st.integers(0, 2**32 - 1)
GOOD, TEXT_ONLY, NOISE = Site(0, "residual"), Site(1, "ffn_output"), Site(1, "residual")
MEASURES = ("auc", "silhouette", "scatter_ratio", "mahalanobis")


def captured(prompts: int = 40, width: int = 8) -> tuple[list[Sample], dict[Site, Rows]]:
    """Harm shows at GOOD in every form, at TEXT_ONLY in text, at NOISE nowhere."""
    rng = np.random.default_rng(0)
    samples = [
        Sample("", label, form, label, index)
        for index in range(prompts)
        for form in FORMS
        for label in ("harmful", "harmless")
    ]
    harmful = np.array([s.label == "harmful" for s in samples])
    text = np.array([s.form == "text" for s in samples])
    last = {}
    for site, shown in ((GOOD, harmful), (TEXT_ONLY, harmful & text), (NOISE, harmful & False)):
        rows = rng.standard_normal((len(samples), width)).astype(np.float32)
        rows[shown, 0] += 4
        last[site] = rows
    return samples, last


def clouds(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of two classes of unequal size, and which are harmful."""
    rng = np.random.default_rng(seed)
    harmful = np.arange(17) < 7
    rows = rng.standard_normal((17, 9)) * rng.uniform(0.2, 3, 9) + 50
    rows[harmful] += rng.standard_normal(9)
    return rows, harmful


@given(SCORES, SCORES)
def test_the_area_is_the_rank_statistic(bad: list[int], good: list[int]) -> None:
    expected = mannwhitneyu(bad, good).statistic / (len(bad) * len(good))
    assert area_under_curve(bad, good) == pytest.approx(expected, abs=1e-12)
    assert area_under_curve(good, bad) == pytest.approx(1 - expected, abs=1e-12)


@given(SEEDS)
def test_the_silhouette_is_its_definition(seed: int) -> None:
    rows, harmful = clouds(seed)
    distance = cdist(rows, rows)
    widths = []
    for i in range(len(rows)):
        own = (harmful == harmful[i]) & (np.arange(len(rows)) != i)
        a, b = distance[i, own].mean(), distance[i, harmful != harmful[i]].mean()
        widths.append((b - a) / max(a, b))
    assert silhouette(rows, harmful) == pytest.approx(np.mean(widths), abs=1e-10)


def test_a_row_alone_in_its_class_and_equal_rows_have_no_silhouette() -> None:
    rows, harmful = np.array([[0.0], [1.0], [1.0]]), np.array([True, False, False])
    assert silhouette(rows, harmful) == pytest.approx(2 / 3)  # 0 for the one, 1 for the pair
    assert silhouette(np.ones((4, 2)), np.array([True, True, False, False])) == 0


@given(SEEDS)
def test_the_scatter_ratio_is_its_definition(seed: int) -> None:
    rows, harmful = clouds(seed)
    middle, within, between = rows.mean(axis=0), np.zeros((9, 9)), np.zeros((9, 9))
    for own in (rows[harmful], rows[~harmful]):
        away = own.mean(axis=0) - middle
        between += len(own) * np.outer(away, away)
        within += (own - own.mean(axis=0)).T @ (own - own.mean(axis=0))
    expected = np.trace(between) / np.trace(within)
    assert scatter_ratio(rows, harmful) == pytest.approx(expected, rel=1e-10)


@given(SEEDS, st.sampled_from([0.1, 2.0, "ledoit-wolf"]))
def test_the_distance_is_its_definition(seed: int, ridge: Ridge) -> None:
    rows, harmful = clouds(seed)
    within = rows.copy()
    for own in (harmful, ~harmful):
        within[own] -= rows[own].mean(axis=0)
    covariance = within.T @ within / len(rows)
    mean = np.trace(covariance) / 9 * np.eye(9)
    if ridge == "ledoit-wolf":
        weight = shrinkage(within)
        covariance = (1 - weight) * covariance + weight * mean
    else:
        covariance = covariance + float(ridge) * mean
    shift = rows[harmful].mean(axis=0) - rows[~harmful].mean(axis=0)
    expected = np.sqrt(shift @ np.linalg.solve(covariance, shift))
    assert mahalanobis(rows, harmful, ridge) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("measure", MEASURES)
def test_what_separates_in_every_form_wins(measure: str) -> None:
    samples, last = captured()
    reports = {report.place: report for report in separability(samples, last, FORMS)}
    assert list(reports) == [GOOD, TEXT_ONLY, NOISE]  # by depth
    worst = {site: report.worst(measure) for site, report in reports.items()}
    assert max(worst, key=lambda site: worst[site]) == GOOD
    at_text_only = reports[TEXT_ONLY].forms
    assert getattr(at_text_only["text"], measure) > 3 * (
        worst[TEXT_ONLY] - 0.5 * (measure == "auc")
    )


def test_areas_near_one_and_near_chance() -> None:
    samples, last = captured()
    reports = {report.place: report.forms for report in separability(samples, last, FORMS)}
    assert min(seen.auc for seen in reports[GOOD].values()) > 0.98
    assert reports[TEXT_ONLY]["text"].auc > 0.98
    # 40 against 40: an area of 0.5 with a deviation of 0.065, four of them
    chance = [reports[TEXT_ONLY]["blank"], *reports[NOISE].values()]
    assert all(abs(seen.auc - 0.5) < 0.2 for seen in chance)


def test_a_prompt_is_never_judged_by_a_direction_it_helped_to_find() -> None:
    """More dimensions than prompts: on its own rows any direction would be perfect."""
    samples, last = captured(prompts=20, width=400)
    (noise,) = separability(samples, {NOISE: last[NOISE]}, ("text",))
    assert noise.forms["text"].auc < 0.8


def test_folds_keep_the_forms_of_a_prompt_together() -> None:
    samples, _ = captured()
    found = folds(samples, 5)
    seen: dict[tuple[str, int], set[int]] = {}
    for sample, fold in zip(samples, found, strict=True):
        seen.setdefault((sample.source, sample.index), set()).add(int(fold))
    assert all(len(some) == 1 for some in seen.values())
    counts = np.bincount(found)
    assert len(counts) == 5
    assert counts.max() - counts.min() <= len(FORMS)


@pytest.mark.parametrize("forms", [("text",), ("text", "typographic")])
def test_one_label_alone_is_refused(forms: tuple[Form, ...]) -> None:
    samples, last = captured()
    keep = [i for i, s in enumerate(samples) if s.label == "harmful" or s.form != forms[-1]]
    kept = {site: rows[keep] for site, rows in last.items()}
    with pytest.raises(MalformedError, match="both labels") as caught:
        separability([samples[i] for i in keep], kept, forms)
    assert caught.value.exit_code == 9


def test_words_beside_a_blank_serve_where_none_stand_alone() -> None:
    samples, last = captured()
    keep = [i for i, s in enumerate(samples) if s.form != "text"]
    (report,) = separability([samples[i] for i in keep], {GOOD: last[GOOD][keep]}, ("blank",))
    assert report.forms["blank"].auc > 0.95


def test_plain_words_are_needed_for_a_direction() -> None:
    samples, last = captured()
    keep = [i for i, s in enumerate(samples) if s.form == "typographic"]
    with pytest.raises(MalformedError, match="form 'blank' without one fold"):
        separability([samples[i] for i in keep], {GOOD: last[GOOD][keep]}, ("typographic",))


def test_numbers_that_are_none_are_refused_and_the_place_is_named() -> None:
    samples, last = captured()
    last[TEXT_ONLY][3, 2] = np.nan
    with pytest.raises(MalformedError, match=r"layers\.1\.ffn_output") as caught:
        separability(samples, last, FORMS)
    assert caught.value.exit_code == 9


def test_rows_that_never_differ_are_refused() -> None:
    rows, harmful = np.ones((6, 3)), np.arange(6) < 3
    for measure in (scatter_ratio, lambda r, h: mahalanobis(r, h, 0.1)):
        with pytest.raises(MalformedError, match="differ"):
            measure(rows, harmful)


def test_rows_must_be_one_a_sample() -> None:
    samples, last = captured()
    with pytest.raises(MalformedError, match="one a sample"):
        Activations(samples[:-1], last, {})
    with pytest.raises(MalformedError, match="at least 240"):
        separability(samples, {GOOD: last[GOOD][:-1]}, FORMS)
