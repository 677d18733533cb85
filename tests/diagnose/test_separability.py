"""Sites are ranked by what separates fresh prompts, at the worse of their forms."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import mannwhitneyu

from guardbake.activations import Activations
from guardbake.diagnose.separability import area_under_curve, folds, rank_sites
from guardbake.errors import MalformedError
from guardbake.samples import FORMS, Sample
from guardbake.site import Site

SCORES = st.lists(st.integers(-3, 3), min_size=1, max_size=30)
GOOD, TEXT_ONLY, NOISE = Site(0, "residual"), Site(1, "ffn_output"), Site(1, "residual")


def activations(prompts: int = 40, width: int = 8) -> Activations:
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
    return Activations(samples, last, {})


@given(SCORES, SCORES)
def test_the_area_is_the_rank_statistic(bad: list[int], good: list[int]) -> None:
    expected = mannwhitneyu(bad, good).statistic / (len(bad) * len(good))
    assert area_under_curve(bad, good) == pytest.approx(expected, abs=1e-12)
    assert area_under_curve(good, bad) == pytest.approx(1 - expected, abs=1e-12)


def test_sites_are_ranked_by_their_worst_form() -> None:
    reports = rank_sites(activations(), [NOISE, TEXT_ONLY, GOOD], FORMS)
    assert reports[0].site == GOOD
    by_site = {report.site: report for report in reports}
    assert by_site[GOOD].worst == min(by_site[GOOD].auc.values()) > 0.98
    assert by_site[TEXT_ONLY].worst < 0.7
    assert by_site[TEXT_ONLY].auc["text"] > 0.98
    # 40 against 40: an area of 0.5 with a deviation of 0.065, three of them
    assert abs(by_site[TEXT_ONLY].auc["blank"] - 0.5) < 0.2
    assert all(abs(area - 0.5) < 0.2 for area in by_site[NOISE].auc.values())
    assert [r.worst for r in reports] == sorted((r.worst for r in reports), reverse=True)


def test_a_prompt_is_never_judged_by_a_direction_it_helped_to_find() -> None:
    """More dimensions than prompts: on its own rows any direction would be perfect."""
    noise = rank_sites(activations(prompts=20, width=400), [NOISE], ("text",))[0]
    assert noise.auc["text"] < 0.8


def test_folds_keep_the_forms_of_a_prompt_together() -> None:
    acts = activations()
    found = folds(acts, 5)
    seen: dict[tuple[str, int], set[int]] = {}
    for sample, fold in zip(acts.samples, found, strict=True):
        seen.setdefault((sample.source, sample.index), set()).add(int(fold))
    assert all(len(some) == 1 for some in seen.values())
    counts = np.bincount(found)
    assert len(counts) == 5
    assert counts.max() - counts.min() <= len(FORMS)


def test_ties_go_to_the_earlier_site() -> None:
    acts = activations()
    same = Activations(acts.samples, {site: acts.last[GOOD] for site in (NOISE, GOOD)}, {})
    assert [r.site for r in rank_sites(same, [NOISE, GOOD], ("text",))] == [GOOD, NOISE]


def test_rows_must_be_one_a_sample() -> None:
    acts = activations()
    with pytest.raises(MalformedError, match="one a sample"):
        Activations(acts.samples[:-1], acts.last, {})
