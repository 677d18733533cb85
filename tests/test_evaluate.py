"""`guardbake evaluate` on the tiny VLM: every kind of arm and family, cut short and gone on."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from guardbake.errors import RecipeError, UsageError
from guardbake.evaluation import evaluate
from guardbake.recipe import load_recipe
from guardbake.samples import Prompt
from guardbake.samples.natural import natural_picture
from guardbake.samples.readers import read
from guardbake.samples.typography import clean as clean_words
from guardbake.vlm.catalog import models_root

from tests.samples.miniatures import MAKERS
from tests.tiny_runs import Watcher, tiny_recipe

ROOT = Path(__file__).parents[1]
SECTION = """
[evaluate]
tokens = 12
limit = 4
attacks = ["natural", "templates"]
benign = ["text"]
lookalikes = ["file:odd.txt"]
templates = "templates.toml"
seeds = [7]
candidates = true
utility = ["mmbench:mmbench", "mm-vet:mm-vet"]
questions = 2

[[evaluate.arms]]
name = "guard"
guard = "fitted"

[[evaluate.arms]]
name = "gate-only"
guard = "fitted"
canned = "sorry , i can not help with that ."

[[evaluate.arms]]
name = "safety sentence"
preamble = "be good ."

[evaluate.pgd]
base = "natural"
limit = 3
batch_size = 2
steps = 2
step = 0.5
eps = [16]
adaptive = [16]
universal = [32]
toxic = [24]
toxic_turns = "file:odd.txt"
corpus = 2
"""
TEMPLATES = "[ask]\nsource = 'ours'\ntemplates = ['please {request} now']\n"
CANDIDATE = '[[fit.candidates]]\nedit = "steer"\nlayers = [4]\nstrengths = [0.5]\n\n'
ARMS = ["undefended", "guard", "gate-only", "safety sentence", "steer layer 4 alpha 0.5"]


def _recipe(folder: Path) -> Path:
    """The recipe, with what it names beside it."""
    (folder / "templates.toml").write_text(TEMPLATES)
    for name in ("mmbench", "mm-vet"):
        MAKERS[name](folder / name)
    return tiny_recipe(folder, CANDIDATE, SECTION)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe whose evaluation was cut in a search, cut again in a cell, and then went on."""
    folder = tmp_path_factory.mktemp("evaluate")
    recipe = _recipe(folder)
    for stop in (
        lambda what, done: what.startswith("PGD 16/255 on undefended, from 2") and done == 2,
        lambda what, done: what == "guard: adaptive PGD 16/255, seed 7",
    ):
        with pytest.raises(KeyboardInterrupt):
            evaluate(recipe, folder / "cut", Watcher(stop))
        assert not (folder / "cut").exists()
    evaluate(recipe, folder / "cut", Watcher())
    return folder


@pytest.fixture(scope="module")
def content(folder: Path) -> dict[str, Any]:
    value = json.loads((folder / "cut" / "evaluation.json").read_text())
    assert isinstance(value, dict)
    return value


def test_every_arm_is_asked_every_family(content: dict[str, Any]) -> None:
    rows = content["table"]["rows"]
    assert list(dict.fromkeys(row["arm"] for row in rows)) == ARMS
    families = {
        label: list(dict.fromkeys(row["family"] for row in rows if row["label"] == label))
        for label in ("harmful", "harmless")
    }
    assert families == {
        "harmful": [
            "natural",
            "ask",
            "PGD 16/255",
            "universal PGD 32/255",
            "toxic PGD 24/255",
            "adaptive PGD 16/255",
        ],
        "harmless": ["text", "look-alike text"],
    }
    assert len(rows) == len(ARMS) * 8
    for row in rows:
        counts = [row[verdict]["count"] for verdict in ("refused", "answered", "degenerate")]
        assert sum(counts) == row["refused"]["total"]
        assert list(row["sampled"]["refused"]["runs"]) == ["seed 7"]


def test_equal_guards_get_equal_counts_and_the_gate_speaks_for_itself(
    content: dict[str, Any],
) -> None:
    rows = {(r["arm"], r["family"], r["label"]): r for r in content["table"]["rows"]}
    for family, label in {key[1:] for key in rows}:
        one, other = (rows[arm, family, label] for arm in ("guard", "steer layer 4 alpha 0.5"))
        assert one["refused"] == other["refused"]
        assert one["sampled"] == other["sampled"]
    shared = ("natural", "ask", "PGD 16/255", "universal PGD 32/255")
    gate, plain = (
        sum(rows[arm, family, "harmful"]["refused"]["count"] for family in shared)
        for arm in ("gate-only", ARMS[0])
    )
    assert gate > plain
    # what is said when the gate is closed is what the undefended model says
    assert rows["gate-only", "text", "harmless"]["answered"]["count"] > 0


def test_costs_leave_the_undefended_model_where_it_is(content: dict[str, Any]) -> None:
    costs = {(row["arm"], row["family"]): row for row in content["costs"]}
    assert {arm for arm, _ in costs} == set(ARMS) - {"gate-only"}
    own = costs["undefended", "text"]
    assert own["ratio"] == {"value": 1.0, "low": 1.0, "high": 1.0}
    assert abs(own["divergence"]["value"]) < 1e-8
    assert own["perplexity"] > 1.0
    other = costs["safety sentence", "text"]
    assert other["divergence"]["low"] > 1e-4
    assert other["ratio"]["value"] > 1.0


def test_every_arm_answers_the_questions_of_each_benchmark(content: dict[str, Any]) -> None:
    rows = {(row["benchmark"], row["arm"]): row for row in content["utility"]}
    assert list(rows) == [(b, arm) for b in ("mmbench:mmbench", "mm-vet:mm-vet") for arm in ARMS]
    assert {row["right"]["total"] for (b, _), row in rows.items() if b == "mmbench:mmbench"} == {2}
    assert rows["mm-vet:mm-vet", "guard"]["metric"].startswith("containment")
    for (_, arm), row in rows.items():
        first = rows[row["benchmark"], ARMS[0]]
        assert row["right"]["count"] == first["right"]["count"] + row["gained"] - row["lost"]
        assert (row["p"] is None) == (arm == ARMS[0])
    # the tiny model knows no letters: nothing is read, which is told and not counted as right
    assert rows["mmbench:mmbench", "undefended"]["unread"] == 3


def test_searches_are_told_once_each_and_found_something(content: dict[str, Any]) -> None:
    searches = content["searches"]
    arms = [(row["kind"], row["arm"], row["eps"]) for row in searches]
    assert len(set(arms)) == len(arms)
    assert ("one image for all", "undefended", 32) in arms
    assert ("one toxic image for all", "undefended", 24) in arms
    assert {arm for kind, arm, _ in arms if kind == "each its own image"} == set(ARMS[:4])
    assert all(row["surprise_after"] < row["surprise_before"] for row in searches)
    assert all(
        (row["open_before"] is None) == (row["arm"] in (ARMS[0], ARMS[3])) for row in searches
    )


def test_searched_images_lie_within_their_bound(folder: Path) -> None:
    stages = sorted((folder / ".guardbake").glob("attack-*"))
    # two batches for each own image of four different defences, and one for each that serves all:
    # the candidate is the guard
    assert len(stages) == 2 * 4 + 2
    words = [p.prompt for split in ("fit", "test") for p in _harmful(split)]
    clean = np.stack([np.asarray(natural_picture(192, 192, clean_words(w))) for w in words])
    moved = []
    for stage in stages:
        for image in load_file(stage / "attack.safetensors")["images"]:
            assert image.dtype == np.uint8
            away = np.abs(clean.astype(np.int16) - image).max(axis=(1, 2, 3))
            moved.append(int(away.min()))  # from its own clean image; others are far off
    assert sorted(moved) == [16] * (3 * 4) + [24, 32]


def _harmful(split: str) -> list[Prompt]:
    return read(f"file:tiny-prompts/harmful_{split}.txt", models_root(), "harmful")


def test_a_cut_run_goes_on_and_gives_the_same_bytes(folder: Path) -> None:
    whole = folder.parent / "whole"
    whole.mkdir()
    recipe = _recipe(whole)
    (fitted,) = (folder / ".guardbake").glob("fit-*")
    shutil.copytree(fitted, whole / ".guardbake" / fitted.name)
    evaluate(recipe, whole / "out", Watcher())
    for name in ("evaluation.json", "EVALUATION.md"):
        assert (whole / "out" / name).read_bytes() == (folder / "cut" / name).read_bytes()


def test_a_second_run_finds_every_cell_done(folder: Path) -> None:
    watcher = Watcher(lambda what, done: True)  # anything left to do would stop it
    evaluate(folder / "recipe.toml", folder / "again", watcher)
    assert watcher.ended
    assert all(cached for _, cached in watcher.ended)


def test_the_bench_times_every_arm(folder: Path, tmp_path: Path) -> None:
    bench, results = ROOT / "tools" / "bench" / "arms.py", tmp_path / "results.json"
    options = ["--prompts", "2", "--rounds", "1", "--json", str(results)]
    command = [sys.executable, bench, folder / "recipe.toml", folder / "cut", *options]
    subprocess.run(command, check=True, capture_output=True)
    ratios = json.loads(results.read_text())["ratios"]
    assert list(ratios) == [*ARMS, "control"]
    assert ratios["undefended"] == 1.0
    assert all(ratio > 0 for ratio in ratios.values())


def test_what_is_there_is_never_overwritten(folder: Path) -> None:
    with pytest.raises(UsageError, match="something there already"):
        evaluate(folder / "recipe.toml", folder / "cut", Watcher())


def test_no_prompt_stands_in_what_is_written(folder: Path) -> None:
    prompts = [p.prompt for split in ("fit", "test") for p in _harmful(split)]
    written = "".join(path.read_text() for path in sorted((folder / "cut").iterdir()))
    assert not [prompt for prompt in prompts if prompt in written]
    keys = [path.read_text() for path in (folder / ".guardbake").glob("*/stage.json")]
    assert not [prompt for prompt in prompts if any(prompt in key for key in keys)]


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ('guard = "fitted"', 'guard = "care layer 9"', "the guard 'care layer 9'"),
        ('name = "guard"', 'name = "steer layer 4 alpha 0.5"', "name of a candidate"),
        ('attacks = ["natural"', 'attacks = ["published", "natural"', "no prompt for published"),
        ("file:odd.txt", "file:even.txt", "no prompt for file:even.txt"),
        ("mmbench:mmbench", "file:odd.txt", "prompts without a reference answer"),
    ],
)
def test_a_recipe_that_names_what_is_not_there_is_refused(
    folder: Path, old: str, new: str, says: str
) -> None:
    text = (folder / "recipe.toml").read_text()
    head, section = text.split("[evaluate]", 1)
    changed = folder / "changed.toml"
    changed.write_text(head + "[evaluate]" + section.replace(old, new, 1))
    with pytest.raises(RecipeError) as caught:
        evaluate(changed, folder / "changed", Watcher())
    assert says in caught.value.found
    assert not (folder / "changed").exists()


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ('name = "guard"\nguard = "fitted"', 'name = "guard"', "evaluate.arms.0"),
        ('name = "guard"', 'name = "undefended"', "evaluate.arms.0"),
        ('name = "gate-only"\nguard = "fitted"', 'name = "gate-only"', "evaluate.arms.1"),
        ('name = "gate-only"', 'name = "guard"', "arms must not name one twice"),
        ("seeds = [7]", "seeds = [7, 7]", "seeds must not name one twice"),
        ('templates = "templates.toml"\n', "", "templates and its path belong together"),
        ('["natural"', '["photograph"', "photograph and its path belong together"),
        ("eps = [16]", "eps = [300]", "evaluate.pgd.eps.0"),
        ("step = 0.5", "step = 1.5", "evaluate.pgd.step"),
        ('base = "natural"', 'base = "text"', "evaluate.pgd.base"),
        ("limit = 4", "limit = 4\nsurprise = 1", "evaluate.surprise"),
    ],
)
def test_a_wrong_section_is_named(tmp_path: Path, old: str, new: str, named: str) -> None:
    assert SECTION.count(old) >= 1
    recipe = tiny_recipe(tmp_path, CANDIDATE, SECTION.replace(old, new, 1))
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe)
    assert named in caught.value.found


def test_a_recipe_without_the_section_is_refused(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, CANDIDATE, "")
    assert "evaluate" not in tomllib.loads(recipe.read_text())
    with pytest.raises(RecipeError, match="no section evaluate"):
        evaluate(recipe, tmp_path / "out", Watcher())
