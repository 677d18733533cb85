"""Utility benchmarks: what is asked, what is the right answer, which rows are one question."""

from __future__ import annotations

from pathlib import Path

import pytest

from guardbake.errors import MalformedError, RecipeError
from guardbake.samples.collect import in_forms
from guardbake.samples.pictures import open_picture
from guardbake.samples.questions import asked_with_options
from guardbake.samples.readers import read_questions


def test_mmbench_shares_a_picture_between_rows_and_groups_the_passes(benchmarks: Path) -> None:
    questions = read_questions("mmbench:mmbench", benchmarks)
    assert [(q.options, q.answer, q.group) for q in questions] == [
        (("red", "blue"), "A", "7"),
        (("blue", "red"), "B", "7"),
        (("ring", "star", "square"), "C", "8"),
    ]
    assert questions[0].prompt == (
        "A square.\nWhich colour?\nA. red\nB. blue\nReply with the letter of the right option."
    )
    assert len({q.image for q in questions}) == 1
    assert open_picture(questions[2].image or b"", "x").getpixel((0, 0)) == (255, 0, 0)
    assert [q.index for q in read_questions("mmbench:mmbench#shape", benchmarks)] == [2]


def test_mmbench_without_answers_still_asks(benchmarks: Path) -> None:
    table = benchmarks / "mmbench/MMBench_DEV_EN.tsv"
    lines = table.read_text().splitlines()
    cut = [",".join(lines[0].split("\t")[:6] + lines[0].split("\t")[9:10]).replace(",", "\t")]
    cut += ["\t".join(line.split("\t")[:6] + line.split("\t")[9:10]) for line in lines[1:]]
    table.write_text("\n".join(cut) + "\n")
    assert {q.answer for q in read_questions("mmbench:mmbench", benchmarks)} == {""}


def test_two_tables_in_a_folder_must_be_told_apart(benchmarks: Path) -> None:
    (benchmarks / "mmbench/MMBench_TEST_EN.tsv").write_text("index\n")
    with pytest.raises(MalformedError, match="2 found"):
        read_questions("mmbench:mmbench", benchmarks)


def test_mm_vet_is_open_and_keeps_its_notation(benchmarks: Path) -> None:
    (question,) = read_questions("mm-vet:mm-vet#math+ocr", benchmarks)
    assert (question.options, question.answer) == ((), "-1<AND>-5")
    assert (question.prompt, question.scoring) == ("What is x?", "containment")


def test_scienceqa_takes_the_test_split_and_questions_with_a_picture(benchmarks: Path) -> None:
    (question,) = read_questions("scienceqa:scienceqa", benchmarks)
    assert (question.index, question.answer, question.options[0]) == (1, "A", "oak")
    assert [q.index for q in read_questions("scienceqa:scienceqa#train,test", benchmarks)] == [1, 2]


def test_a_question_serves_as_a_harmless_prompt(benchmarks: Path) -> None:
    (sample,) = in_forms(read_questions("mm-vet:mm-vet", benchmarks), ("text", "blank"))
    assert (sample.form, sample.label, sample.prompt) == ("image", "harmless", "What is x?")


def test_prompts_without_a_reference_are_no_questions(benchmarks: Path) -> None:
    with pytest.raises(RecipeError, match=r"mmbench:<path>, mm-vet:<path>"):
        read_questions("xstest:xstest", benchmarks)


def test_one_option_is_no_choice() -> None:
    with pytest.raises(MalformedError, match=r"1 options.*x \[0\]"):
        asked_with_options("Which?", "", ["oak"], "x [0]")
