"""Every study of the tiny VLM from end to end; cut short and gone on; and what it must not show."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from guardbake.errors import RecipeError, UsageError
from guardbake.report.markdown import plain
from guardbake.report.page import write_report
from guardbake.samples import FORMS
from guardbake.studies import StudyName
from guardbake.studies.run import STUDIES, STUDY, STUDY_TEXT, study
from guardbake.vlm.catalog import models_root

from tests.studies.conftest import CANDIDATES, SECTION
from tests.tiny_runs import Watcher, tiny_recipe

Studied = Callable[[StudyName], Path]
Read = Callable[[StudyName], dict[str, Any]]


def test_every_name_is_a_study() -> None:
    assert list(STUDIES) == list(StudyName)


@pytest.mark.parametrize("name", list(StudyName))
def test_a_study_is_figures_plots_and_words(studied: Studied, name: StudyName) -> None:
    folder = studied(name)
    content = json.loads((folder / STUDY).read_text())
    text = (folder / STUDY_TEXT).read_text()
    plots = [path.name for path in folder.iterdir() if path.suffix == ".svg"]
    assert plots
    assert {path.name for path in folder.iterdir()} == {STUDY, STUDY_TEXT, *plots}
    assert all(f"]({plot})" in text for plot in plots)
    assert content["finding"]
    assert all(plain(sentence) in text for sentence in content["finding"])
    # what is said is made of the figures that are written, and of nothing else
    assert STUDIES[name].finding(content["figures"]) == content["finding"]
    assert [list(row) for row in STUDIES[name].table(content["figures"]).rows] == content["table"][
        "rows"
    ]


@pytest.mark.parametrize("name", list(StudyName))
def test_no_prompt_stands_in_a_study(studied: Studied, name: StudyName) -> None:
    files = sorted((models_root() / "tiny-prompts").glob("*.txt"))
    lines = [line for file in files for line in file.read_text().splitlines()]
    prompts = [line for line in lines if line and not line.startswith("#")]
    assert prompts
    written = "".join(path.read_text() for path in studied(name).iterdir())
    assert not [prompt for prompt in prompts if prompt in written]


def test_studies_go_into_the_report(studied: Studied, tmp_path: Path) -> None:
    names = (StudyName.blank_image, StudyName.scan, StudyName.anchors)
    folders = [studied(name) for name in names]
    (fitted,) = (folders[0].parent / ".guardbake").glob("fit-*")
    found = write_report([fitted, *folders], tmp_path / "out.html", tmp_path / "card.md")
    assert {study.study for study in found.studies} == {name.value for name in names}
    card = (tmp_path / "card.md").read_text()
    page = (tmp_path / "out.html").read_text()
    plots = sum(len(study.plots) for study in found.studies)
    assert page.count("<svg ") == plots + 2
    for name in names:
        assert f"## Study: {name.value}" in card


def test_blank_image_asks_the_same_prompts_in_every_form(figures: Read) -> None:
    rows = figures(StudyName.blank_image)["table"]["rows"]
    assert len(rows) == 2 * 2 * 4
    assert {row["refused"]["total"] for row in rows} == {16}
    refused = {
        row["arm"]: row["refused"]["count"]
        for row in rows
        if (row["label"], row["family"]) == ("harmful", "undefended")
    }
    # the toy refuses harmful text, and hardly reads it in a picture
    assert refused["text"] == 16
    assert refused["typographic"] < 8


def test_lookalikes_are_counted_apart(figures: Read) -> None:
    rows = figures(StudyName.lookalikes)["rows"]
    assert {(row["kind"], row["total"]) for row in rows} == {
        ("look-alikes", 2), ("other harmless", 16),
    }  # fmt: skip
    assert {row["form"] for row in rows} == set(FORMS)
    assert {row["what"] for row in rows} == {"undefended", "guarded", "gate opens"}
    # an edit behind a closed gate changes nothing
    cells = {(row["kind"], row["form"], row["what"]): row["count"] for row in rows}
    for kind, form, what in cells:
        if cells[kind, form, "gate opens"] == 0:
            assert cells[kind, form, "guarded"] == cells[kind, form, "undefended"], what


def test_layers_tell_where_the_edit_works(figures: Read) -> None:
    found = figures(StudyName.layers)
    assert [row["layer"] for row in found["rows"]] == [1, 4, 5]
    before = found["undefended"]["harmful"]["value"]
    assert max(row["harmful"]["value"] for row in found["rows"]) > before
    for row in (*found["rows"], found["undefended"]):
        for label in ("harmful", "harmless"):
            assert row[label]["low"] <= row[label]["value"] <= row[label]["high"]


def test_scan_marks_the_front(figures: Read) -> None:
    found = figures(StudyName.scan)
    rows = found["rows"]
    # steer at two strengths, add at one rank and two strengths
    assert len(rows) == 2 + 2

    def aims(row: dict[str, Any]) -> tuple[float, ...]:
        return tuple(row[aim]["value"] for aim in ("attack", "refused", "perplexity"))

    for row in rows:
        others = [aims(other) for other in rows if aims(other) != aims(row)]
        beaten = [o for o in others if all(a <= b for a, b in zip(o, aims(row), strict=True))]
        assert row["front"] == (not beaten)
    assert any(row["front"] for row in rows)
    assert found["undefended"]["perplexity"]["value"] == 1.0
    assert len({row["name"] for row in rows}) == len(rows)


def test_anchors_are_drawn_in_three_ways(figures: Read) -> None:
    found = figures(StudyName.anchors)
    cells = [(row["kind"], row["pairs"]) for row in found["rows"]]
    assert cells == [(kind, n) for kind in ("random", "narrow", "spread") for n in (4, 10)]
    assert found["left_out"] == [400]
    assert found["available"] == 24
    for row in found["rows"]:
        assert row["auc"]["text"]["value"] > 0.9
        assert 0 <= row["detection"]["typographic"]["value"] <= 1


def test_boundary_compares_two_probes_per_layer_and_form(figures: Read) -> None:
    found = figures(StudyName.boundary)
    assert [(r["layer"], r["form"]) for r in found["rows"]] == [
        (layer, form) for layer in (1, 4, 5) for form in ("text", "typographic")
    ]
    for row in found["rows"]:
        assert row["gain"]["value"] == pytest.approx(row["kernel"] - row["linear"])
    points = found["picture"]["points"]["text"]
    assert [len(axis) for axis in points["harmful"]] == [16, 16]


def test_modality_measures_every_pair_of_forms(figures: Read) -> None:
    found = figures(StudyName.modality)
    assert [row["layer"] for row in found["rows"]] == [1, 4, 5]
    for row in found["rows"]:
        assert len(row["gaps"]) == len(row["alike"]) == len(row["shifts"]) == 3
        assert all(-1.0001 <= value <= 1.0001 for value in row["alike"].values())
        # along a direction nothing lies farther than it lies at all
        for form, offset in row["offsets"].items():
            assert abs(offset) <= row["gaps"][f"text to {form}"] + row["shifts"]["text"]
    assert set(found["pictures"]) == {"1", "4", "5"}


@pytest.mark.parametrize(
    ("name", "cut"),
    [
        (StudyName.layers, "verdicts: steer layer 4 alpha 1, harmful"),
        (StudyName.anchors, "capturing residuals"),
    ],
)
def test_a_cut_study_goes_on_and_gives_the_same_bytes(
    studied: Studied, tmp_path: Path, name: StudyName, cut: str
) -> None:
    whole = studied(name)
    tiny_recipe(tmp_path, CANDIDATES, SECTION, 24)
    (fitted,) = (whole.parent / ".guardbake").glob("fit-*")
    shutil.copytree(fitted, tmp_path / ".guardbake" / fitted.name)
    with pytest.raises(KeyboardInterrupt):
        study(
            name, tmp_path / "recipe.toml", tmp_path / "out", Watcher(lambda what, _: what == cut)
        )
    assert not (tmp_path / "out").exists()
    watcher = Watcher()
    study(name, tmp_path / "recipe.toml", tmp_path / "out", watcher)
    if name is StudyName.layers:
        assert ("cell", True) in watcher.ended
    for path in whole.iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes(), path.name


def test_a_second_run_has_nothing_left_to_do(studied: Studied) -> None:
    folder = studied(StudyName.blank_image)
    watcher = Watcher(lambda what, done: True)
    study(StudyName.blank_image, folder.parent / "recipe.toml", folder.parent / "again", watcher)
    assert watcher.ended
    assert all(cached for _, cached in watcher.ended)


def test_what_is_there_is_never_overwritten(studied: Studied) -> None:
    folder = studied(StudyName.blank_image)
    with pytest.raises(UsageError, match="something there already"):
        study(StudyName.blank_image, folder.parent / "recipe.toml", folder, Watcher())


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("limit = 16", "limit = 16\nsurprise = 1", "study.surprise"),
        ("limit = 16", "limit = 0", "study.limit"),
        ("draws = 4", "draws = 1", "study.draws"),
        ('edits = ["steer"]', 'edits = ["astra"]', "study.edits"),
        ("layers = [1, 4, 5]", "layers = [1, 1]", "layers must not name one twice"),
        ("strengths = [0.5, 1.0]", "strengths = [0.0]", "study.strengths"),
    ],
)
def test_a_wrong_section_is_named(tmp_path: Path, old: str, new: str, says: str) -> None:
    assert SECTION.count(old) == 1
    recipe = tiny_recipe(tmp_path, CANDIDATES, SECTION.replace(old, new), 24)
    with pytest.raises(RecipeError) as caught:
        study(StudyName.anchors, recipe, tmp_path / "out", Watcher())
    assert says in caught.value.found


@pytest.mark.parametrize(
    ("name", "old", "new", "says"),
    [
        (StudyName.boundary, "layers = [1, 4, 5]", "layers = [60]", "layer 60"),
        (StudyName.anchors, "pairs = [4, 10, 400]", "pairs = [400]", "24 pairs"),
        (StudyName.lookalikes, "file:odd.txt", "file:even.txt", "0 look-alikes"),
    ],
)
def test_a_study_of_what_is_not_there_is_refused(
    studied: Studied, tmp_path: Path, name: StudyName, old: str, new: str, says: str
) -> None:
    recipe = tiny_recipe(tmp_path, CANDIDATES, SECTION.replace(old, new), 24)
    fitted = studied(StudyName.blank_image).parent / ".guardbake"
    (folder,) = fitted.glob("fit-*")
    shutil.copytree(folder, tmp_path / ".guardbake" / folder.name)
    with pytest.raises(RecipeError) as caught:
        study(name, recipe, tmp_path / "out", Watcher())
    assert says in caught.value.found
    assert not (tmp_path / "out").exists()
