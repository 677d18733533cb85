"""A recipe is read strictly: what is not understood is an error that names the place."""

from __future__ import annotations

from pathlib import Path

import pytest

from guardbake.errors import RecipeError
from guardbake.recipe import load_recipe, require_layers
from guardbake.vlm.catalog import models_root

TINY = models_root() / "tiny-llava.toml"


def _edited(tmp_path: Path, old: str, new: str) -> Path:
    text = TINY.read_text(encoding="utf-8")
    assert text.count(old) >= 1, f"{old!r} is not in the recipe"
    path = tmp_path / "recipe.toml"
    path.write_text(text.replace(old, new, 1), encoding="utf-8")
    return path


@pytest.mark.parametrize("name", ["tiny-llava.toml", "tiny-qwen2_5_vl.toml", "demo.toml"])
def test_the_committed_recipes_are_read(name: str) -> None:
    recipe = load_recipe(models_root() / name)
    assert recipe.fit.candidates
    assert recipe.parity.logits.source


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ('name = "tiny-llava"', 'name = "tiny-llava"\nsurprise = 1', "surprise"),
        ("[fit.sensor]", "[fit.sensor]\nlayer = 3", "fit.sensor.layer"),
        ("batch_size = 24", "batch_size = 0", "batch_size"),
        ("batch_size = 24", 'batch_size = "24"', "batch_size"),
        ("tokens = 12", "tokens = 11", "tokens"),
        ("harmless_rise = 0.05", "harmless_rise = 1.5", "harmless_rise"),
        ("harmless_rise = 0.05", "harmless_rise = nan", "harmless_rise"),
        ('edit = "steer"', 'edit = "push"', "edit"),
        ("budget = 1e-4", "budget = 0.0", "budget"),
        ('profile = "sequence"', 'profile = "always"', "sensor"),
        ('profile = "sequence"', 'profile = "sometimes"', "profile"),
        ("[samples.test]", "[samples.exam]", "samples"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, old: str, new: str, named: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(_edited(tmp_path, old, new))
    assert named in caught.value.found
    assert "recipe.toml" in caught.value.where


def test_every_problem_is_named_at_once(tmp_path: Path) -> None:
    path = _edited(tmp_path, "batch_size = 24", "batch_size = 0\nsurprise = 1")
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert "batch_size" in caught.value.found
    assert "surprise" in caught.value.found


@pytest.mark.parametrize("content", [b"= 3", b"\xff\xfe", b""])
def test_no_toml(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "recipe.toml"
    path.write_bytes(content)
    with pytest.raises(RecipeError):
        load_recipe(path)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no readable file"):
        load_recipe(tmp_path / "absent.toml")


def test_a_sensor_at_or_behind_the_first_edit_is_refused(tmp_path: Path) -> None:
    text = TINY.read_text(encoding="utf-8")
    recipe = load_recipe(TINY)
    assert recipe.fit.sensor is not None
    first = min(layer for c in recipe.fit.candidates for layer in c.layers)
    lines = text.split("[fit.sensor]\n")
    rest = lines[1].split("\n", 1)[1]
    path = tmp_path / "recipe.toml"
    path.write_text(f"{lines[0]}[fit.sensor]\nlayers = [0, {first}]\n{rest}", encoding="utf-8")
    with pytest.raises(RecipeError, match="sensor layers must end before"):
        load_recipe(path)


def test_a_layer_beyond_the_model(tmp_path: Path) -> None:
    recipe = load_recipe(TINY)
    require_layers(recipe, 6, TINY)
    with pytest.raises(RecipeError, match="which the model has"):
        require_layers(recipe, 4, TINY)
