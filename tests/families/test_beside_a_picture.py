"""Families that are never asked in words alone: what is refused, and what stands in its place."""

from __future__ import annotations

import json
import shutil
import tomllib
from pathlib import Path

import pytest

from guardbake.errors import BehaviourError, RecipeError, UnsupportedError
from guardbake.recipe import Recipe
from guardbake.recipe_evaluate import EvaluateSection
from guardbake.steps.families import columns
from guardbake.steps.fit import fit_guard
from guardbake.steps.split import split_samples
from guardbake.vlm.catalog import models_root
from guardbake.vlm.load import read_config
from guardbake.vlm.requests import Typography, collated

from tests.families.checkpoints import STOCK
from tests.onnx.conftest import Exported

DRAWING = Typography(4, 4, "open")
BOTH = pytest.mark.parametrize("member", ["instructblip", "paligemma"], indirect=True)
OTHER_TEXTS = {
    "instructblip": STOCK.T5Config(d_model=32, num_layers=2),
    "paligemma": STOCK.Gemma2Config(hidden_size=32),  # PaliGemma 2
}


@BOTH
def test_words_alone_are_refused(member: Exported) -> None:
    with pytest.raises(UnsupportedError, match=r'words without a picture.*"blank"') as refused:
        collated(member.vlm, [("open", None)])
    assert refused.value.exit_code == 3


@BOTH
def test_a_checkpoint_with_another_text_model_is_refused(member: Exported, tmp_path: Path) -> None:
    """By its configuration, before its weights are looked for."""
    config = json.loads((member.vlm.folder / "config.json").read_text())
    other = OTHER_TEXTS[member.vlm.family.name].to_dict()
    (tmp_path / "config.json").write_text(json.dumps(config | {"text_config": other}))
    found = f"{member.vlm.family.name} whose text model is a {other['model_type']}"
    with pytest.raises(UnsupportedError, match=found) as refused:
        read_config(tmp_path)
    assert refused.value.exit_code == 3
    shutil.copyfile(member.vlm.folder / "config.json", tmp_path / "config.json")
    read_config(tmp_path)


@BOTH
def test_a_fit_goes_by_blank_pictures(member: Exported) -> None:
    """Sensor, edit and sign test, up to the refusal that random weights earn: it names the forms
    that were asked."""
    recipe = _recipe()
    splits = split_samples(
        recipe, models_root(), DRAWING, member.vlm.processor.tokenizer, member.vlm.family.imageless
    )
    with pytest.raises(BehaviourError, match="over 1 candidates") as unwritten:
        fit_guard(member.vlm, recipe, splits, DRAWING, None, lambda what, done, total: None)
    assert unwritten.value.exit_code == 5
    assert "harmful blank prompts" in str(unwritten.value)
    assert "text prompts" not in str(unwritten.value)


@pytest.mark.parametrize("family", ["text", "templates"])
def test_an_evaluation_does_not_ask_words_alone(family: str, tmp_path: Path) -> None:
    values: dict[str, object] = {
        "tokens": 12, "limit": 1, "attacks": [family], "benign": ["blank"], "candidates": True
    }  # fmt: skip
    if family == "templates":
        values["templates"] = "templates.json"
    section = EvaluateSection.model_validate(values)
    with pytest.raises(RecipeError, match=f"{family}, words alone") as refused:
        columns(section, [], DRAWING, tmp_path, imageless=False)
    assert refused.value.exit_code == 2


def _recipe() -> Recipe:
    """A pooling sensor and one push, a few prompts."""
    values = tomllib.loads((models_root() / "tiny-llava.toml").read_text(encoding="utf-8"))
    values["fit"]["candidates"] = [{"edit": "steer", "layers": [3], "strengths": [1.0]}]
    values["fit"]["sensor"] = {
        "layers": [1, 2],
        "readings": 2,
        "ridges": [1.0],
        "pooling": [0.0, 0.5],
        "false_positive_rate": 0.2,
    }
    for split in ("fit", "validate"):
        values["samples"][split]["limit"] = 12
    return Recipe.model_validate(values)
