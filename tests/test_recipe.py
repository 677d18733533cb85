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


CARE = 'edit = "care"'
STEER = 'edit = "steer"'


@pytest.mark.parametrize(
    ("edit", "keys", "says"),
    [
        (STEER, "rank = 2", "rank is of no meaning for steer"),
        (STEER, "ridge = 0.1", "ridge are for care alone"),
        (STEER, 'fusion = "parallel"\nattribution = true', "fusion, attribution are for care"),
        (STEER, "layers = [4, 4]", "layers names one twice"),
        ('edit = "remove"', 'numerics = "public"', "numerics are for care alone"),
        ('edit = "remove"', "together = true", "together needs more than one layer"),
        (CARE, 'branches = ["text", "visual"]', "branches must be"),
        (CARE, "branches = []", "branches must be"),
        (CARE, 'branches = ["sound"]', "branches"),
        (CARE, 'branches = ["text"]\nfusion = "sequential"', "need both branches"),
        (CARE, "visual_share = 0.3", "fusion parallel alone"),
        (CARE, 'fusion = "parallel"\nvisual_share = 1.5', "visual_share"),
        (CARE, 'branches = ["text"]\ncontrast = "plain"', "is the visual branch's"),
        (CARE, 'contrast = "plain"', "captions must say"),
        (CARE, 'numerics = "public"\nridge = 0.1', "absolute with public numerics"),
        (CARE, 'attribution = "yes"', "attribution"),
        (CARE, 'numerics = "public"\nwinsorise = 0.1', "winsorise is nothing the public"),
        (CARE, 'numerics = "public"\nrank = "held-out"', "rank must be a number with public"),
        ('edit = "add"', 'rank = "held-out"', "rank must be a number but for care"),
        (CARE, "winsorise = 0.5", "winsorise"),
        (CARE, 'rank = "most"', "rank"),
        (CARE, "ridge = 0.0", "ridge"),
        (CARE, "alpha = 1.0", "alpha"),
    ],
)
def test_candidates_that_make_no_sense(tmp_path: Path, edit: str, keys: str, says: str) -> None:
    text = TINY.read_text(encoding="utf-8")
    start = text.index(edit)
    table = text[start : text.index("[", text.index("strengths", start) + 14)]
    kept = [line for line in table.splitlines() if line.split(" =")[0] not in keys]
    path = tmp_path / "recipe.toml"
    path.write_text(text.replace(table, "\n".join([*kept, keys]) + "\n", 1), encoding="utf-8")
    with pytest.raises(RecipeError, match=says) as caught:
        load_recipe(path)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    "keys",
    [
        'fusion = "parallel"\nvisual_share = 0.3',
        'branches = ["visual"]\nattribution = true',
        'numerics = "public"\nfusion = "sequential"',
    ],
)
def test_candidates_that_make_sense(tmp_path: Path, keys: str) -> None:
    recipe = load_recipe(_edited(tmp_path, CARE, f"{CARE}\n{keys}"))
    again = type(recipe).model_validate(recipe.model_dump(by_alias=True))
    assert again == recipe  # what is written into a bundle is read again


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


EACH = '[[fit.candidates]]\nedit = "add"\nstrengths = [1.0]\ngates = "each"\nlayers = '


def test_a_layer_with_a_gate_of_its_own_may_lie_before_the_sensor_s_last(tmp_path: Path) -> None:
    path, text = tmp_path / "recipe.toml", TINY.read_text(encoding="utf-8")
    path.write_text(f"{text}\n{EACH}[1, 4]\n", encoding="utf-8")
    assert load_recipe(path).fit.candidates[-1].gates == "each"
    path.write_text(f"{text}\n{EACH}[0, 4]\n", encoding="utf-8")
    with pytest.raises(RecipeError, match="layer 0 has no gate of its own"):
        load_recipe(path)
    start, stop = text.index("[fit.sensor]"), text.index("[[fit.candidates]]")
    ungated = (text[:start] + text[stop:]).replace('profile = "sequence"', 'profile = "always"')
    path.write_text(ungated, encoding="utf-8")
    load_recipe(path)
    path.write_text(f"{ungated}\n{EACH}[4]\n", encoding="utf-8")
    with pytest.raises(RecipeError, match="needs a sensor section"):
        load_recipe(path)


def test_a_layer_beyond_the_model(tmp_path: Path) -> None:
    recipe = load_recipe(TINY)
    require_layers(recipe, 6, TINY)
    with pytest.raises(RecipeError, match="which the model has"):
        require_layers(recipe, 4, TINY)
