"""The fit stage on the tiny VLM: what must not be written is not, and the error says why."""

from __future__ import annotations

import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from guardbake.errors import BehaviourError, GuardbakeError, MalformedError, RecipeError
from guardbake.recipe import Recipe
from guardbake.spec import GuardSpec
from guardbake.steps.fit import fit_guard, load_candidates, save_candidates
from guardbake.steps.split import split_samples
from guardbake.vlm.catalog import models_root
from guardbake.vlm.load import Vlm, load_vlm
from guardbake.vlm.requests import Typography

ROOT = models_root()
STEER = {"edit": "steer", "layers": [4], "strengths": [1.0]}
REMOVE = {"edit": "remove", "layers": [4], "strengths": [1.0]}
HARMFUL, HARMLESS, LATER = "harmful_fit.txt", "harmless_fit.txt", "harmful_validate.txt"


@pytest.fixture(scope="module")
def vlm() -> Vlm:
    return load_vlm(str(ROOT / "tiny-llava"))


def fitted(
    vlm: Vlm,
    candidate: dict[str, Any],
    harmful: str = HARMFUL,
    harmless: str = HARMLESS,
    sensor: dict[str, Any] | None = None,
) -> tuple[GuardSpec, dict[str, Any], dict[str, GuardSpec]]:
    """One candidate, fitted on 20 prompts of each label and judged by as many; always on unless
    there is a sensor. It may refuse every harmless one and babble: the sign alone decides.
    """
    values = tomllib.loads((ROOT / "tiny-llava.toml").read_text(encoding="utf-8"))
    fit, samples = values["fit"], values["samples"]
    del fit["sensor"]
    fit |= {"profile": "always", "candidates": [candidate]}
    if sensor is not None:
        fit |= {"profile": "sequence", "sensor": sensor}
    fit |= {"harmless_rise": 1.0, "degenerate": 1.0}
    sources = {
        "harmful": [f"file:tiny-prompts/{harmful}"],
        "harmless": [f"file:tiny-prompts/{harmless}"],
    }
    samples["fit"] = sources | {"limit": 20}
    samples["validate"]["limit"] = 20
    recipe = Recipe.model_validate(values)
    section = recipe.samples.typography
    typography = Typography(section.columns, section.rows, section.instruction)
    splits = split_samples(recipe, ROOT, typography, vlm.processor.tokenizer)
    return fit_guard(vlm, recipe, splits, typography, None, lambda what, done, total: None)


def test_a_push_the_right_way_is_written(vlm: Vlm, tmp_path: Path) -> None:
    """The control of the traps below: the same prompts, nothing planted."""
    spec, figures, tried = fitted(vlm, STEER | {"strengths": [0.5, 0.25]})
    assert spec.edits[0].kind == "steer"
    assert figures["sign_test"][0]["rise"] > 0.2
    save_candidates(tried, tmp_path / "candidates")
    again = load_candidates(tmp_path / "candidates")
    assert list(again) == ["steer layer 4 alpha 0.5", "steer layer 4 alpha 0.25"]
    assert [one.digest for one in again.values()] == [one.digest for one in tried.values()]
    assert replace(again[figures["chosen"]], provenance=spec.provenance).digest == spec.digest


RATE = 0.2


def test_each_layer_has_a_gate_by_what_enters_it(vlm: Vlm) -> None:
    """The common sensor ends at layer 3 and is of no use to this candidate."""
    sensor = {"layers": [2, 3], "readings": 2, "ridges": [1.0], "false_positive_rate": RATE}
    layers = {"layers": [4, 3, 5], "together": True, "gates": "each"}
    spec, figures, _ = fitted(vlm, STEER | layers | {"strengths": [0.25]}, sensor=sensor)
    assert figures["chosen"] == "steer layers 3+4+5 alpha 0.25, gates each"
    assert [(edit.site.layer, edit.gate) for edit in spec.edits] == [(3, 0), (4, 1), (5, 2)]
    assert [str(site) for s in spec.sensors for site in s.sites] == [
        "layers.2.residual", "layers.3.residual", "layers.4.residual",
    ]  # fmt: skip
    assert [figure["sites"] for figure in figures["sensors"]] == [
        [str(site) for site in each.sites] for each in spec.sensors
    ]
    for figure, each in zip(figures["sensors"], spec.sensors, strict=True):
        assert figure["thresholds"] == pytest.approx(each.thresholds)
        assert max(figure["harmless_open_rate"].values()) <= RATE
        assert not each.pools


TRAPS: dict[str, tuple[dict[str, Any], str, str, type[GuardbakeError], int, str]] = {
    # labels of the fitting prompts swapped: the push points towards complying
    "wrong sign": (STEER, HARMLESS, HARMFUL, BehaviourError, 5, "does not rise"),
    "refusal direction removed": (REMOVE, HARMFUL, HARMLESS, BehaviourError, 5, "does not rise"),
    "rank larger than the samples": (
        {"edit": "care", "layers": [4], "strengths": [1.0], "rank": 32},
        HARMFUL,
        HARMLESS,
        MalformedError,
        9,
        "at least 32 finite rows",
    ),
    "one prompt in two splits": (STEER, LATER, HARMLESS, RecipeError, 2, "two splits"),
}


@pytest.mark.parametrize("trap", list(TRAPS))
def test_a_trap_is_caught(vlm: Vlm, trap: str) -> None:
    candidate, harmful, harmless, error, code, says = TRAPS[trap]
    with pytest.raises(error, match=says) as caught:
        fitted(vlm, candidate, harmful, harmless)
    assert caught.value.exit_code == code
