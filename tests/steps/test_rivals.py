"""What rivals are fitted and trained on comes from the samples given, and its lack is named."""

from __future__ import annotations

import tomllib
from typing import Any

import pytest
from pydantic import ValidationError

from guardbake.activations import Activations, Turns
from guardbake.errors import MalformedError
from guardbake.fit.candidates import candidates
from guardbake.fit.contrasts import Contrasts
from guardbake.recipe import CandidateSection, FitSection
from guardbake.samples import Form, Label, Sample
from guardbake.steps.exchanges import exchanges, some
from guardbake.steps.rivals import ablated_rows, refined_vectors
from guardbake.vlm.catalog import models_root
from guardbake.vlm.forced import turn_ids
from guardbake.vlm.load import Vlm, load_vlm
from guardbake.vlm.requests import Typography

ASKING = Typography(4, 4, "answer the request in the image .")
FORMS: tuple[Form, ...] = ("text", "typographic")


@pytest.fixture(scope="module")
def vlm() -> Vlm:
    return load_vlm(str(models_root() / "tiny-llava"))


def section(*edits: str) -> FitSection:
    values: dict[str, Any] = tomllib.loads((models_root() / "tiny-llava.toml").read_text())["fit"]
    tried = [{"edit": edit, "layers": [4], "strengths": [1.0]} for edit in edits or ("steer",)]
    return FitSection.model_validate(values | {"candidates": tried})


def read(label: Label, count: int, *forms: Form) -> list[Sample]:
    text = (models_root() / "tiny-prompts" / f"{label}_fit.txt").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")][:count]
    return [Sample(t, label, form, "ours", i) for form in forms for i, t in enumerate(lines)]


def quiet(_what: str, _done: int, _total: int) -> None:
    """Nobody watches."""


def test_every_label_is_answered_as_it_should_be(vlm: Vlm) -> None:
    given = read("harmful", 5, *FORMS) + read("harmless", 5, *FORMS)
    fit = section()
    found = exchanges(vlm, fit, given, 3, ASKING, 8, quiet)
    refusing, compliant = (
        turn_ids(vlm, fit.refusing[0], ends=True),
        turn_ids(vlm, fit.compliant[0], ends=False),
    )
    harmful, harmless = found[:3], found[3:]
    assert all((e.wanted, e.unwanted) == (refusing, compliant) for e in harmful)
    assert {e.sample.label for e in harmless} == {"harmless"}
    assert len(harmless) == 3
    assert all(e.unwanted == refusing and e.wanted != refusing for e in harmless)
    assert len({e.wanted for e in harmless}) > 1  # its own answers, each to its own request


def test_a_draw_is_by_name_and_in_order() -> None:
    given = read("harmful", 20, *FORMS)
    drawn = some(given, "harmful", 12)
    assert len(drawn) == 12
    assert drawn == [sample for sample in given if sample in drawn]
    assert {sample.form for sample in drawn} == set(FORMS)
    assert set(some(given[::-1], "harmful", 12)) == set(drawn)
    assert set(some(given, "harmful", 5)) < set(drawn)
    assert some(given, "harmless", 5) == []


def test_one_label_alone_trains_nothing(vlm: Vlm) -> None:
    with pytest.raises(MalformedError, match="3 harmful and 0 answered harmless"):
        exchanges(vlm, section(), read("harmful", 3, "text"), 3, ASKING, 8, quiet)
    prompts = Activations(read("harmful", 3, "text"), {}, {})
    with pytest.raises(MalformedError, match="0 answered harmless"):
        refined_vectors(vlm, section("spo"), prompts, ASKING, 8, quiet)


def test_words_alone_leave_astra_nothing(vlm: Vlm) -> None:
    given = read("harmful", 3, "text") + read("harmless", 3, "text")
    with pytest.raises(MalformedError, match="0 harmful and 0 harmless pictures"):
        ablated_rows(vlm, section("astra"), given, ASKING, 8, quiet)


def test_nothing_is_measured_that_no_candidate_needs(vlm: Vlm) -> None:
    given = Activations(read("harmful", 1, "text"), {}, {})
    assert ablated_rows(vlm, section(), given.samples, ASKING, 8, quiet) == ({}, {})
    assert refined_vectors(vlm, section(), given, ASKING, 8, quiet) == {}


@pytest.mark.parametrize("edit", ["astra", "spo"])
def test_what_was_not_measured_is_not_fitted(edit: str) -> None:
    none = Contrasts(Activations([], {}, {}), Turns({}), Turns({}))
    with pytest.raises(MalformedError, match=r"rows at layers\.4\.ffn_output"):
        list(candidates(section(edit).candidates, none))


@pytest.mark.parametrize("edit", ["astra", "spo"])
@pytest.mark.parametrize("extra", [{"rank": 2}, {"fusion": "parallel"}])
def test_keys_of_other_edits_are_refused(edit: str, extra: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        CandidateSection.model_validate({"edit": edit, "layers": [4], "strengths": [1.0]} | extra)
