"""The rivals that are fitted or trained, as rows of `guardbake evaluate` on the tiny VLM."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from guardbake.errors import RecipeError, UsageError
from guardbake.evaluate.arms import Arm
from guardbake.evaluation import evaluate
from guardbake.fit.candidates import Candidate
from guardbake.recipe import load_recipe
from guardbake.recipe_evaluate import EvaluateSection
from guardbake.site import Site
from guardbake.spec import GuardSpec
from guardbake.steps.evaluate import arms_of
from guardbake.steps.gates import behind_first_gate
from guardbake.vlm.low_rank import LowRank

from tests.tiny_runs import Watcher, tiny_recipe

CANDIDATES = """
[fit.rivals]
pictures = 6
exchanges = 12
steps = 8

[[fit.candidates]]
edit = "steer"
layers = [4]
strengths = [0.5]

[[fit.candidates]]
edit = "astra"
rival = true
layers = [4, 5]
strengths = [1.0]
together = true

[[fit.candidates]]
edit = "spo"
rival = true
layers = [4, 5]
strengths = [0.5]
together = true

"""
STEER, ASTRA, SPO = (
    "steer layer 4 alpha 0.5",
    "astra layers 4+5 alpha 1",
    "spo layers 4+5 alpha 0.5",
)
UNGATED = "\n".join(
    f'[[evaluate.arms]]\nname = "{name}"\nguard = "{guard}"\nungated = true\n'
    for name, guard in (("steering", STEER), ("ASTRA", ASTRA), ("SPO-VLM", SPO))
)
SECTION = f"""
[evaluate]
tokens = 12
limit = 10
attacks = ["typographic"]
benign = ["text"]

{UNGATED}
[[evaluate.arms]]
name = "fine-tune"
tuned = true

[evaluate.tuning]
pairs = 16
rank = 4
steps = 20
batch_size = 4
rate = 4e-3

[evaluate.pgd]
base = "typographic"
limit = 1
batch_size = 1
steps = 1
step = 0.5
adaptive = [16]
through = ["ASTRA", "fine-tune"]
"""
ARMS = ["undefended", "steering", "ASTRA", "SPO-VLM", "fine-tune"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rivals")
    evaluate(tiny_recipe(folder, CANDIDATES, SECTION), folder / "out", Watcher())
    return folder


@pytest.fixture(scope="module")
def content(folder: Path) -> dict[str, Any]:
    value = json.loads((folder / "out" / "evaluation.json").read_text())
    assert isinstance(value, dict)
    return value


def refused(content: dict[str, Any], arm: str, label: str, family: str) -> int:
    (row,) = [
        r
        for r in content["table"]["rows"]
        if (r["arm"], r["label"], r["family"]) == (arm, label, family)
    ]
    return int(row["refused"]["count"])


def test_every_rival_is_a_row(content: dict[str, Any]) -> None:
    rows = content["table"]["rows"]
    assert list(dict.fromkeys(row["arm"] for row in rows)) == ARMS
    arms = {arm["name"]: arm for arm in content["arms"]}
    assert {name for name, arm in arms.items() if arm["guard"]} == {"steering", "ASTRA", "SPO-VLM"}
    assert [name for name, arm in arms.items() if arm["tuned"]] == ["fine-tune"]


def test_rivals_are_no_contenders(folder: Path) -> None:
    (fitted,) = (folder / ".guardbake").glob("fit-*")
    figures = json.loads((fitted / "fit.json").read_text())
    assert [row["candidate"] for row in figures["sign_test"]] == [STEER]


def test_rivals_refuse_more_of_what_is_harmful(content: dict[str, Any]) -> None:
    seen = {arm: refused(content, arm, "harmful", "typographic") for arm in ARMS}
    for arm in ("steering", "SPO-VLM", "fine-tune"):
        assert seen[arm] > seen["undefended"]
    assert seen["ASTRA"] >= seen["undefended"]
    assert refused(content, "fine-tune", "harmless", "text") <= 2


def test_a_fine_tune_stays_in_its_own_row(content: dict[str, Any]) -> None:
    costs = {(row["arm"], row["family"]): row for row in content["costs"]}
    assert costs["undefended", "text"]["ratio"] == {"value": 1.0, "low": 1.0, "high": 1.0}
    assert abs(costs["undefended", "text"]["divergence"]["value"]) < 1e-8
    for arm in ARMS[1:]:
        assert costs[arm, "text"]["divergence"]["value"] > 1e-7


def test_an_attack_knows_the_tuned_model(content: dict[str, Any]) -> None:
    before = {row["arm"]: row["surprise_before"] for row in content["searches"]}
    assert list(before) == ["undefended", "ASTRA", "fine-tune"]
    adaptive = [r["arm"] for r in content["table"]["rows"] if r["family"] == "adaptive PGD 16/255"]
    assert adaptive == list(before)
    assert abs(before["fine-tune"] - before["undefended"]) > 0.1
    assert all(
        row["surprise_after"] <= row["surprise_before"] + 0.05 for row in content["searches"]
    )


def test_a_second_run_trains_nothing(folder: Path) -> None:
    watcher = Watcher()
    evaluate(folder / "recipe.toml", folder / "again", watcher)
    assert all(cached for _, cached in watcher.ended)
    assert "tuning" in {stage for stage, _ in watcher.ended}
    for name in ("evaluation.json", "EVALUATION.md"):
        assert (folder / "again" / name).read_bytes() == (folder / "out" / name).read_bytes()


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("tuned = true", f'tuned = true\nguard = "{STEER}"', "not fitted for a fine-tuned model"),
        ("tuned = true", 'preamble = "be good ."', "the section tuning belong together"),
        ("ungated = true", 'ungated = true\ncanned = "no"', "ungated needs a guard"),
        ("tuned = true", "", "a guard, a preamble or a fine-tune"),
        ("rank = 4", "rank = 0", "evaluate.tuning.rank"),
    ],
)
def test_a_wrong_row_is_named(tmp_path: Path, old: str, new: str, named: str) -> None:
    assert old in SECTION
    with pytest.raises(RecipeError) as caught:
        load_recipe(tiny_recipe(tmp_path, CANDIDATES, SECTION.replace(old, new, 1)))
    assert named in caught.value.found


def test_an_attack_through_an_unknown_arm_is_refused(
    tmp_path: Path, guard: Callable[..., GuardSpec]
) -> None:
    section = SECTION.replace('through = ["ASTRA"', 'through = ["ASTR"')
    recipe = load_recipe(tiny_recipe(tmp_path, CANDIDATES, section))
    assert recipe.evaluate is not None
    arms = [arm for arm in recipe.evaluate.arms if arm.guard is None]
    asked = recipe.evaluate.model_copy(update={"arms": arms})
    with pytest.raises(RecipeError, match="no arm named ASTR"):
        arms_of(asked, guard(), {}, LowRank({}, {}))


def test_a_replacing_guard_needs_its_gate(guard: Callable[..., GuardSpec]) -> None:
    arms = [{"name": "a", "guard": "fitted", "ungated": True}]
    section = EvaluateSection.model_validate(
        {"tokens": 12, "limit": 1, "attacks": ["text"], "benign": ["text"], "arms": arms}
    )
    with pytest.raises(RecipeError, match="replace without a gate"):
        arms_of(section, guard("sequence", "replace"), {}, None)
    _, ungated = arms_of(section, guard("sequence", "steer"), {}, None)
    assert ungated.spec is not None
    assert (ungated.spec.profile, ungated.spec.sensors) == ("always", ())


def test_without_gates_all_edits_of_several_are_on(guard: Callable[..., GuardSpec]) -> None:
    arms = [{"name": "a", "guard": "fitted", "ungated": True}]
    section = EvaluateSection.model_validate(
        {"tokens": 12, "limit": 1, "attacks": ["text"], "benign": ["text"], "arms": arms}
    )
    fitted = guard("sequence", "add", later=(Site(1, "residual"),), edits=(1, 2))
    _, ungated = arms_of(section, fitted, {}, None)
    assert ungated.spec is not None
    assert [edit.gate for edit in ungated.spec.edits] == [0, 0]


def test_a_rival_stands_behind_the_first_gate(guard: Callable[..., GuardSpec]) -> None:
    fitted = guard("sequence", "add", later=(Site(1, "residual"),), edits=(1, 2))
    edits = guard("sequence", "steer", edits=(2,)).edits
    spec = behind_first_gate(fitted, Candidate("rival", "a method", edits))
    assert spec.sensors == fitted.sensors[:1]
    assert (spec.method, spec.edits, spec.profile) == ("a method", edits, "sequence")


def test_a_guard_does_not_stand_on_changed_weights(guard: Callable[..., GuardSpec]) -> None:
    with pytest.raises(UsageError, match="one or the other"):
        Arm("both", guard("sequence", "steer"), tuned=LowRank({}, {}))
