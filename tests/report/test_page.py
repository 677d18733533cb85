"""The report: whole or not at all, the same bytes for the same records, nothing in it but text."""

from __future__ import annotations

import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from guardbake.errors import EnvironmentFault, MalformedError, UsageError
from guardbake.report.page import write_report

from tests.report.conftest import (
    behaviour,
    certificate,
    diagnosis,
    evaluation,
    fit,
    parity,
    study,
    write,
)

Write = Callable[..., Path]
HOSTILE = '<script>alert(1)</script> " onload="x | [a](http://b) $x^{$ _y_ &amp; {{ 7*7 }}'


class Page(HTMLParser):
    """What a browser would make of a page: tags, attributes, and the text of every cell."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.texts: list[str] = []
        self.feed(path.read_text("utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with out.html and card.md, made from every record there can be."""
    folder = tmp_path_factory.mktemp("whole")
    write(
        folder / "records",
        fit=fit(),
        diagnosis=diagnosis(),
        behaviour=behaviour(),
        parity=parity(),
        evaluation=evaluation(),
        certificate=certificate(),
        study=study(),
    )
    assert not write_report([folder / "records"], folder / "out.html", folder / "card.md").missing
    return folder


def test_all_records_make_every_section(whole: Path) -> None:
    page, card = Page(whole / "out.html"), (whole / "card.md").read_text("utf-8")
    titles = [
        "The guard, and why this one",
        "Layers",
        "Evaluation",
        "Behaviour in the bake",
        "Parity",
        "Study: layers",
        "What is not claimed",
        "Digests",
    ]
    assert [text for text in page.texts if text in titles] == titles
    assert [line[3:] for line in card.splitlines() if line.startswith("## ")] == titles
    for name in ("steer layer 2 alpha 1", "remove layer 2", "refused: does not rise", "0.970"):
        assert name in page.texts
        assert name in card
    # 8 of 8 refused under the guard, with Wilson's interval; 3 of 8 on the model as it is
    assert "1.00 [0.68, 1.00] (8/8)" in page.texts
    assert "0.38 [0.14, 0.69] (3/8)" in page.texts
    assert "After layer 2, <there>." in page.texts
    assert "Share refused, greedy, as a second judge judges it." in page.texts
    assert "kappa 0.75" in card
    # 5 plots of the diagnosis, 2 of each table, 3 of the study
    assert page.tags.count("svg") == 12


def test_the_page_needs_nothing_else(whole: Path) -> None:
    page = Page(whole / "out.html")
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    assert ("name", "viewport") in page.attributes
    assert "@media print" in (whole / "out.html").read_text("utf-8")
    ids = [value for key, value in page.attributes if key == "id"]
    assert ids
    assert len(set(ids)) == len(ids)
    names = {f"#{one}" for one in ids}
    references = [value or "" for key, value in page.attributes if key == "xlink:href"]
    assert references
    assert set(references) <= names
    assert not [v for k, v in page.attributes if "http" in (v or "") and "xmlns" not in k]
    assert str(whole) not in (whole / "out.html").read_text("utf-8")


def test_same_records_same_bytes(whole: Path, tmp_path: Path) -> None:
    write_report([whole / "records"], tmp_path / "out.html", tmp_path / "card.md")
    for name in ("out.html", "card.md"):
        assert (tmp_path / name).read_bytes() == (whole / name).read_bytes()


def test_hostile_strings_stay_strings(records: Write, tmp_path: Path) -> None:
    content = certificate()
    content["name"] = HOSTILE
    content["gates"][0] |= {"status": "fail", "detail": HOSTILE}
    content["figures"]["fit"] = fit(HOSTILE)
    content["figures"]["fit"]["sensors"] = [{HOSTILE: HOSTILE}]
    choice = diagnosis()
    choice["choice"]["rule"] = HOSTILE
    choice["causes"] = {HOSTILE: choice["causes"]["text"]}
    folder = records(
        certificate=content, evaluation=evaluation(HOSTILE, f"\x01_{HOSTILE}"), diagnosis=choice
    )
    write_report([folder], tmp_path / "out.html", tmp_path / "card.md")
    page = Page(tmp_path / "out.html")
    assert "script" not in page.tags
    assert not [key for key, _ in page.attributes if key.startswith("on")]
    assert page.texts.count(HOSTILE) >= 4
    assert not [
        text for text in page.texts if "49" in text and "7*7" not in text and "alert" in text
    ]
    card = (tmp_path / "card.md").read_text("utf-8")
    assert "<script" not in card.replace("\\<script", "")
    assert "[a](" not in card.replace("\\[a](", "")
    heads = {
        line.count("|") - line.count("\\|") for line in card.splitlines() if "only here" in line
    }
    rows = [line for line in card.splitlines() if line.startswith("| harmful: ")]
    assert rows
    assert {line.count("|") - line.count("\\|") for line in rows} == heads


def test_what_no_schema_names_is_not_shown(records: Write, tmp_path: Path) -> None:
    content = evaluation()
    content["table"]["rows"][0]["prompt"] = "a secret sentence"
    write_report([records(evaluation=content)], tmp_path / "out.html", tmp_path / "card.md")
    for name in ("out.html", "card.md"):
        assert "a secret sentence" not in (tmp_path / name).read_text("utf-8")


def test_missing_records_are_named_and_what_they_would_show_is_not_claimed(
    records: Write, tmp_path: Path
) -> None:
    found = write_report([records(fit=fit())], tmp_path / "out.html", tmp_path / "card.md")
    assert found.missing == ("certificate", "diagnosis", "behaviour", "parity", "evaluation")
    card = (tmp_path / "card.md").read_text("utf-8")
    assert "Not among the records: certificate.json, diagnosis.json, behaviour.json" in card
    for claim in ("Nothing is said of behaviour", "Nothing is certified", "No rival stands"):
        assert claim in card
    assert "| record, fit |" in card
    assert "## Evaluation" not in card
    # the curves over layers come from the fit where there is no diagnosis
    assert Page(tmp_path / "out.html").tags.count("svg") == 2


def test_a_certificate_brings_the_records_behind_its_gates(records: Write, tmp_path: Path) -> None:
    found = write_report([records(certificate=certificate())], tmp_path / "out.html", None)
    assert found.missing == ("diagnosis", "evaluation")
    assert found.origin["fit"] == "inside certificate.json"


def test_an_evaluation_with_held_out_and_adaptive_families_claims_them(
    records: Write, tmp_path: Path
) -> None:
    folder = records(evaluation=evaluation(family="adaptive PGD 16/255"))
    write_report([folder], tmp_path / "out.html", tmp_path / "card.md")
    card = (tmp_path / "card.md").read_text("utf-8")
    assert "No attack was optimised" not in card
    assert "none was held out" not in card
    write_report([records(evaluation=evaluation())], tmp_path / "2.html", tmp_path / "2.md")
    assert "No attack was optimised" in (tmp_path / "2.md").read_text("utf-8")
    assert "none was held out" in (tmp_path / "2.md").read_text("utf-8")


def broken(value: dict[str, Any], *path: str | int, to: object) -> dict[str, Any]:
    inner: Any = value
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = to
    return value


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("fit", [], "a JSON list"),
        ("fit", {}, "chosen: Field required"),
        ("fit", broken(fit(), "chosen", to="another"), "a choice that is no candidate"),
        ("fit", broken(fit(), "separability", 0, "site", to="layer 1"), "'layer 1'"),
        ("evaluation", broken(evaluation(), "table", "rows", to=[]), "table.rows"),
        ("evaluation", broken(evaluation(), "costs", 0, "perplexity", to="1"), "perplexity"),
        ("behaviour", broken(behaviour(), "table", "rows", 0, "label", to="odd"), "rows.0.label"),
        ("parity", broken(parity(), "comparisons", 0, "worst", to=None), "comparisons.0.worst"),
        ("diagnosis", broken(diagnosis(), "choice", "evidence", 1, "ranks", to=[1]), "ranks"),
        ("diagnosis", broken(diagnosis(), "separability", 0, "component", to="x"), "component"),
        ("diagnosis", broken(diagnosis(), "separability", 3, "forms", to={}), "in other forms"),
        ("diagnosis", broken(diagnosis(), "causes", "text", "effects", 0, to={}), "effects.0"),
        ("study", broken(study(), "finding", to=[]), "finding"),
        ("study", broken(study(), "plots", 0, "kind", to="pie"), "plots.0"),
        ("study", broken(study(), "plots", 0, "panels", "text", 0, "x", to=[1]), "lengths that do"),
        ("study", broken(study(), "plots", 1, "panels", to={}), "panels that do"),
        ("study", broken(study(), "plots", 2, "panels", "q", to={}), "panels that do"),
        ("study", broken(study(), "table", "rows", to="x"), "table.rows"),
        ("certificate", broken(certificate(), "figures", "fit", to=3), "a JSON int"),
        ("certificate", broken(certificate(), "digests", "guard", to=None), "digests.guard"),
    ],
)
def test_a_malformed_record_is_refused_and_nothing_is_written(
    records: Write, tmp_path: Path, name: str, value: object, says: str
) -> None:
    with pytest.raises(MalformedError) as caught:
        write_report([records(**{name: value})], tmp_path / "out.html", tmp_path / "card.md")
    assert says in caught.value.found
    assert [path.name for path in tmp_path.iterdir()] == ["records"]


@pytest.mark.parametrize("text", ['{"chosen": NaN}', "{", '{"a": 1, "a": 2}', "\ufeff{}"])
def test_what_is_not_json_exits_9(
    records: Write, tmp_path: Path, run: Callable[..., int], text: str
) -> None:
    folder = records()
    (folder / "fit.json").write_text(text, encoding="utf-8")
    assert run("report", folder, "-o", tmp_path / "out.html") == 9
    assert not (tmp_path / "out.html").exists()


def test_records_of_different_bakes_are_not_put_together(records: Write, tmp_path: Path) -> None:
    folder, out = records(certificate=certificate(), fit=fit("another")), tmp_path / "out.html"
    with pytest.raises(UsageError, match=r"not the one in certificate\.json"):
        write_report([folder], out, None)
    (folder / "fit.json").unlink()
    other = evaluation() | {"model": "f" * 64}
    with pytest.raises(UsageError, match="records of one model"):
        write_report([records(evaluation=other)], out, None)
    second = write(tmp_path / "second", certificate={})
    with pytest.raises(UsageError, match=r"two different certificate\.json"):
        write_report([folder, second], out, None)
    (second / "certificate.json").unlink()
    with pytest.raises(UsageError, match="different records of study layers"):
        write_report(
            [write(folder, study=study()), write(second, study=study() | {"x": 1})], out, None
        )
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("nowhere",), "no folder"),
        ((".",), "no record"),
    ],
)
def test_folders_without_records_are_refused(
    tmp_path: Path, arguments: tuple[str, ...], says: str
) -> None:
    with pytest.raises(UsageError, match=says):
        write_report([tmp_path / name for name in arguments], tmp_path / "out.html", None)


def test_what_is_there_stays(records: Write, tmp_path: Path, run: Callable[..., int]) -> None:
    folder, card = records(fit=fit()), tmp_path / "card.md"
    card.write_text("mine")
    assert run("report", folder, "-o", tmp_path / "out.html", "--card", card) == 2
    assert card.read_text() == "mine"
    assert not (tmp_path / "out.html").exists()
    assert run("report", folder, "-o", tmp_path / "x", "--card", tmp_path / "x") == 2


@pytest.mark.parametrize("package", ["jinja2", "matplotlib.figure"])
def test_a_missing_package_is_named(
    records: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(EnvironmentFault, match=r"guardbake\[report\]"):
        write_report([records(fit=fit())], tmp_path / "out.html", None)
    assert not (tmp_path / "out.html").exists()
