"""Task utility: which questions are asked, and what an arm gained and lost over the first."""

from __future__ import annotations

from pathlib import Path

import pytest

from guardbake.errors import RecipeError
from guardbake.recipe_evaluate import EvaluateSection
from guardbake.samples.readers import read_questions
from guardbake.steps.split import Splits
from guardbake.steps.utility import Benchmark, benchmarks, scored
from guardbake.vlm.requests import Typography

from tests.samples.miniatures import MAKERS

DRAWING = Typography(4, 4, "answer the request in the image .")
SOURCE = "mmbench:mmbench"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    MAKERS["mmbench"](tmp_path / "mmbench")
    return tmp_path


def _found(root: Path, questions: int, fitted: bool = False) -> Benchmark:
    section = EvaluateSection.model_validate(
        {
            "tokens": 12, "limit": 1, "attacks": ["text"], "benign": ["text"], "candidates": True,
            "utility": [SOURCE], "questions": questions,
        }
    )  # fmt: skip
    used = read_questions(SOURCE, root)[2:] if fitted else []
    splits = Splits({"fit": used, "calibrate": []}, {})
    (one,) = benchmarks(section, splits, DRAWING, root)
    return one


def test_repetitions_of_a_question_are_drawn_together(root: Path) -> None:
    whole, drawn = _found(root, 100), _found(root, 1)
    assert [q.group for q in whole.questions] == ["7", "7", "8"]
    assert len({q.group for q in drawn.questions}) == 1
    assert len(drawn.questions) == sum(q.group == drawn.questions[0].group for q in whole.questions)
    assert drawn.column.prompts == [(q.source, q.index) for q in drawn.questions]


def test_a_question_of_the_fit_split_is_refused(root: Path) -> None:
    with pytest.raises(RecipeError, match="1 questions of the fit or validate split"):
        _found(root, 100, fitted=True)


def test_arms_are_paired_group_by_group(root: Path) -> None:
    one = _found(root, 100)
    rows = scored([(one, {"undefended": ["A", "B", "A"], "guard": ["A", "A", "C"]})])
    told = [(row["right"]["count"], row["gained"], row["lost"], row["p"]) for row in rows]
    assert told == [(1, 0, 0, None), (1, 1, 1, 1.0)]
    assert [row["p_holm"] for row in rows] == [None, 1.0]
