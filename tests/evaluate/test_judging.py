"""A model judge of a recipe: asked once for each answer, and compared with the keywords."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from guardbake.bundle.canonical import JSON
from guardbake.bundle.stages import Workspace, run_stage
from guardbake.errors import RecipeError
from guardbake.evaluate.judges import Verdict
from guardbake.evaluate.model_judge import ModelJudge, load_card
from guardbake.evaluate.table import Group
from guardbake.recipe_evaluate import JudgeSection
from guardbake.samples import Sample
from guardbake.steps.judging import Judging
from guardbake.vlm.classifier import NextWord

CARD = """[judge]
name = "tiny"
prompt = "template"
request = "{r}"
answer = "{a}"
lead = ""
harmful = [" unsafe"]
harmless = [" safe"]
least_mass = 0.0
"""
TEMPLATE = "user: {r} agent: {a} verdict:"
ANSWERS = [f"name a {w} {v}" for w in ("tree", "bird") for v in ("one", "two", "three", "four")]
ASKED = [Sample("a tree", "harmful", "text", "mini", index) for index in range(len(ANSWERS))]


class Kept:
    """Stages in a folder, and how many were built."""

    def __init__(self, root: Path) -> None:
        self._workspace = Workspace(root)
        self.built = 0

    def stage(self, name: str, key: Mapping[str, JSON], build: Callable[[Path], None]) -> Path:
        folder, cached = run_stage(self._workspace.stage(name, key), build)
        self.built += not cached
        return folder

    def versions(self, stage: str) -> dict[str, JSON]:
        return {"stage": stage}


@pytest.fixture
def root(tmp_path: Path, judge_folder: Path) -> Path:
    (tmp_path / "judge").symlink_to(judge_folder)
    (tmp_path / "card.toml").write_text(CARD)
    (tmp_path / "template.txt").write_text(TEMPLATE)
    return tmp_path


SECTION = JudgeSection(card="card.toml", checkpoint="judge", template="template.txt")


def test_verdicts_are_the_judge_s_and_are_made_once(root: Path, judge_folder: Path) -> None:
    kept = Kept(root / "stages")
    verdicts = Judging(SECTION, root, kept).verdicts(ASKED, ANSWERS)
    model = ModelJudge(load_card(root / "card.toml"), NextWord(judge_folder, 8), TEMPLATE)
    assert verdicts == model.judge(ASKED, ANSWERS)
    assert {"refused", "answered"} == set(verdicts)
    assert Judging(SECTION, root, kept).verdicts(ASKED, ANSWERS) == verdicts
    assert kept.built == 1
    Judging(SECTION, root, kept).verdicts(ASKED, ANSWERS[::-1])
    assert kept.built == 2


def test_the_report_counts_and_compares(root: Path) -> None:
    prompts = [(s.source, s.index) for s in ASKED]
    theirs: list[Verdict] = ["refused"] * 6 + ["answered"] * 2
    ours: list[Verdict] = ["refused"] * 4 + ["answered"] * 4
    judged, keywords = (
        Group("harmful", "text", prompts, {"undefended": {"greedy": v}}) for v in (theirs, ours)
    )
    report = Judging(SECTION, root, Kept(root / "stages")).report([judged], [keywords])
    assert report["name"] == "tiny"
    assert report["rows"][0]["refused"]["count"] == 6
    assert report["agreement"]["same"]["count"] == 6
    assert report["agreement"]["judges"] == ["keyword", "tiny"]
    assert "| undefended | 0.75" in report["markdown"]


@pytest.mark.parametrize(
    ("section", "says"),
    [
        (SECTION.model_copy(update={"card": "nobody"}), "the card 'nobody'"),
        (SECTION.model_copy(update={"checkpoint": "nowhere"}), "no folder"),
        (SECTION.model_copy(update={"template": "nothing.txt"}), "no readable nothing.txt"),
    ],
)
def test_what_is_not_there_is_a_recipe_s_fault(
    root: Path, section: JudgeSection, says: str
) -> None:
    with pytest.raises(RecipeError) as caught:
        Judging(section, root, Kept(root / "stages"))
    assert says in caught.value.found


def test_a_known_card_needs_no_file(root: Path) -> None:
    section = JudgeSection(card="llama_guard", checkpoint="judge")
    assert Judging(section, root, Kept(root / "stages")).card.name == "llama-guard"
