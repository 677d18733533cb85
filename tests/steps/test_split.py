"""The splits of a recipe: disjoint by request, a family held out, pictures beside pictures."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import replace
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from guardbake.errors import RecipeError
from guardbake.recipe import Recipe, SplitSection, load_recipe
from guardbake.samples import FORMS, SENSED, Sample, plainest
from guardbake.steps.fit import FIT_FORMS
from guardbake.steps.parity import mixed
from guardbake.steps.split import Splits, split_samples
from guardbake.vlm.catalog import models_root
from guardbake.vlm.requests import Typography

DRAWING = Typography(4, 4, "Answer the image.")
COLUMNS = ("jailbreak_query", "redteam_query", "format", "policy", "image_path")
FLAGS = ("selected_mini", "transfer_from_llm")


def _words(text: str, **_: Any) -> dict[str, Any]:
    starts = [i for i in range(len(text)) if text[i] == " "] + [len(text)]
    spans = list(pairwise(starts))
    return {"input_ids": list(range(len(spans))), "offset_mapping": spans}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Lists of words, and a JailBreakV whose first row wraps the first word of list 1."""
    for name in ("1", "2", "3", "4"):
        (tmp_path / f"{name}.txt").write_text(f"name {name} a\nname {name} b\n")
    picture = BytesIO()
    Image.new("RGB", (2, 2)).save(picture, "PNG")
    (tmp_path / "figstep").mkdir()
    (tmp_path / "figstep/1.png").write_bytes(picture.getvalue())
    with (tmp_path / "JailBreakV_28K.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow([*COLUMNS, *FLAGS])
        for goal in ("Name 1 A!", "name 5"):
            rows.writerow(["Fill in", goal, "figstep", "Trees", "figstep/1.png", "True", "False"])
    return tmp_path


def _recipe(held_out: Sequence[str] = (), **harmful: list[str]) -> Recipe:
    recipe = load_recipe(models_root() / "tiny-llava.toml")
    lists = {"fit": ("1", "2"), "validation": ("3", "4"), "test": ("5", "6"), "parity": ("1", "2")}
    sections = {}
    for name, (bad, good) in lists.items():
        given = harmful.get(name, [f"file:{bad}.txt"])
        sections[name] = SplitSection(harmful=given, harmless=[f"file:{good}.txt"])
    changed = recipe.samples.model_copy(update={**sections, "held_out": list(held_out)})
    return recipe.model_copy(update={"samples": changed})


def _split(root: Path, recipe: Recipe) -> Splits:
    for name in ("5", "6"):
        (root / f"{name}.txt").write_text(f"say {name} a\nsay {name} b\n")
    return split_samples(recipe, root, DRAWING, _words)


def test_an_attack_on_a_fitted_request_is_overlap(root: Path) -> None:
    with pytest.raises(
        RecipeError, match=r"'fit' and 'test'.*1\.txt \[0\] and jailbreakv:\. \[0\]"
    ):
        _split(root, _recipe(test=["jailbreakv:."]))


def test_a_held_out_family_is_asked_for_in_the_test_split(root: Path) -> None:
    recipe = _recipe(["jailbreakv"], fit=["file:3.txt"], validation=["file:1.txt"])
    with pytest.raises(RecipeError, match="no prompt of the held-out family"):
        _split(root, recipe)
    (root / "1.txt").write_text("name other\nname more\n")
    splits = _split(root, _recipe(["jailbreakv"], test=["jailbreakv:.", "file:5.txt"]))
    samples = splits.samples("test")
    assert [s.form for s in samples].count("image") == 2
    assert {s.family for s in samples if s.form == "image"} == {"jailbreakv/figstep"}
    assert all(s.image is None for s in samples if s.form in FORMS)


def test_pictures_to_fit_on_want_harmless_ones_beside_them(root: Path) -> None:
    with pytest.raises(RecipeError, match=r"all harmful.*samples\.validate"):
        _split(root, _recipe(validation=["jailbreakv:."], fit=["file:3.txt"]))


def test_a_mixed_batch_takes_every_form_in_turn() -> None:
    drawn = [Sample("x", "harmless", form, "a", i) for form in FORMS for i in range(2)]
    shown = [Sample("x", "harmless", "image", "a", i, b"x") for i in range(3)]
    forms = [s.form for s in mixed([*drawn, *shown])]
    assert forms == [*FORMS, "image", *FORMS, "image", "image"]


def test_words_of_a_model_that_is_always_shown_a_picture_are_asked_once(root: Path) -> None:
    """Beside a blank one, under that name: the same request counts as one."""
    splits = replace(_split(root, _recipe()), imageless=False)
    assert splits.forms(SENSED) == ("blank", "natural", "typographic")
    samples = splits.samples("fit", FIT_FORMS)
    assert plainest(samples) == "blank"
    asked = [(sample.source, sample.index, sample.form) for sample in samples]
    assert len(set(asked)) == len(asked) == 2 * len(splits.prompts["fit"])
    assert {form for _, _, form in asked} == {"blank", "typographic"}
