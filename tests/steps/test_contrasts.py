"""What CARE's candidates need is captured, at their sites and nowhere else."""

from __future__ import annotations

import tomllib
from typing import Any

import numpy as np
import pytest

from guardbake.fit.contrasts import Contrasts
from guardbake.recipe import FitSection, Recipe
from guardbake.samples import Sample
from guardbake.site import Site
from guardbake.steps.contrasts import Captions, attribution_for, capture_contrasts
from guardbake.steps.split import Splits, split_samples
from guardbake.vlm.capture import capture
from guardbake.vlm.catalog import models_root
from guardbake.vlm.load import Vlm, load_vlm
from guardbake.vlm.requests import Typography

ROOT = models_root()
ASKING = Typography(4, 4, "answer the request in the image .")
CARE: dict[str, Any] = {"edit": "care", "layers": [4], "strengths": [1.0]}
FOUR, FIVE = Site(4, "ffn_output"), Site(5, "ffn_output")


@pytest.fixture(scope="module")
def vlm() -> Vlm:
    return load_vlm(str(ROOT / "tiny-llava"))


@pytest.fixture(scope="module")
def recipe() -> dict[str, Any]:
    values = tomllib.loads((ROOT / "tiny-llava.toml").read_text(encoding="utf-8"))
    values["fit"]["captions"] = ["describe the image .", "what is in the image ?"]
    values["samples"]["fit"]["limit"] = 5
    return values


@pytest.fixture(scope="module")
def splits(vlm: Vlm, recipe: dict[str, Any]) -> Splits:
    return split_samples(Recipe.model_validate(recipe), ROOT, ASKING, vlm.processor.tokenizer)


def captured(vlm: Vlm, recipe: dict[str, Any], splits: Splits, *candidates: dict[str, Any]) -> Any:
    section = FitSection.model_validate(recipe["fit"] | {"candidates": list(candidates)})
    prompts = capture(vlm, splits.samples("fit", ("text",)), [FOUR], ASKING, 10, _quiet)
    return capture_contrasts(vlm, section, splits, prompts, ASKING, 4, lambda what, a, b: None)


def _quiet(_done: int, _total: int) -> None:
    pass


def test_nothing_is_captured_that_no_candidate_needs(
    vlm: Vlm, recipe: dict[str, Any], splits: Splits
) -> None:
    steer = {"edit": "steer", "layers": [4], "strengths": [1.0]}
    found: Contrasts = captured(vlm, recipe, splits, steer)
    assert not found.compliant.mean
    assert not found.refusing.mean
    assert not found.plain.samples
    found = captured(vlm, recipe, splits, CARE | {"branches": ["visual"]})
    assert not found.compliant.mean
    section = FitSection.model_validate(recipe["fit"] | {"candidates": [CARE]})
    assert attribution_for(section) is None


def test_each_candidate_finds_its_rows(vlm: Vlm, recipe: dict[str, Any], splits: Splits) -> None:
    found: Contrasts = captured(
        vlm,
        recipe,
        splits,
        CARE | {"branches": ["text"]},
        CARE | {"layers": [5], "attribution": True, "contrast": "plain"},
    )
    for turns in (found.compliant, found.refusing):
        assert set(turns.mean) == {FOUR, FIVE}
        assert set(turns.attributed) == {FIVE}
        assert turns.mean[FOUR].shape == (5, 128)
        assert np.isfinite(turns.mean[FOUR]).all()
    assert np.abs(found.compliant.mean[FOUR] - found.refusing.mean[FOUR]).max() > 0.01
    assert set(found.plain.image_mean) == set(found.plain.image_attributed) == {FIVE}
    rows = found.plain.image_attributed[FIVE]
    assert rows.shape == (5, 128)
    assert len(np.unique(rows, axis=0)) == 5  # five different pictures


def test_plain_pictures_carry_no_request() -> None:
    """The sample's own words reach neither the text nor the picture; the picture goes by number."""
    asking = Captions(ASKING, ("describe the image .", "what is it ?"))
    samples = [Sample(words, "harmless", "natural", "plain", n) for n in (0, 1) for words in "ab"]
    (first, a), (again, b), (second, c), _ = (asking.request(s, None) for s in samples)  # type: ignore[arg-type]
    assert (first, again, second) == (
        "describe the image .",
        "describe the image .",
        "what is it ?",
    )
    assert a is not None
    assert b is not None
    assert c is not None
    assert a.tobytes() == b.tobytes() != c.tobytes()
    typographic = ASKING.columns * 48, ASKING.rows * 48
    assert a.size == typographic
