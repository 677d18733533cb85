"""Splits: overlap is found whatever the spelling, digests and draws are stable."""

from __future__ import annotations

from pathlib import Path

import pytest

from guardbake.errors import RecipeError
from guardbake.samples import Label, Prompt
from guardbake.samples.collect import collect, in_forms
from guardbake.samples.digests import identity, normalised
from guardbake.samples.splits import prove_disjoint, take


def _prompts(*texts: str, source: str = "ours", label: Label = "harmless") -> list[Prompt]:
    return [Prompt(text, label, source, index) for index, text in enumerate(texts)]


def test_normalised_keeps_words_only() -> None:
    assert normalised("  Don\u2019t\tSHOUT_now, \uff11!") == "don t shout now 1"


@pytest.mark.parametrize("twin", ["Name a zebra", "name  a ZEBRA?", "Name-a-zebra."])
def test_overlap_names_both_places_and_not_the_prompt(twin: str) -> None:
    with pytest.raises(RecipeError) as caught:
        prove_disjoint(
            {"fit": _prompts("x", "Name a zebra"), "test": _prompts("y", twin, source="theirs")}
        )
    text = str(caught.value)
    assert "'fit'" in text
    assert "'test'" in text
    assert "ours [1] and theirs [1]" in text
    assert "zebra" not in text.lower()


def test_overlap_between_labels_is_overlap() -> None:
    with pytest.raises(RecipeError, match="two splits"):
        prove_disjoint({"a": _prompts("x"), "b": _prompts("x", label="harmful")})


def test_digests_ignore_order_and_repetition_and_see_content_and_label() -> None:
    base = prove_disjoint({"a": _prompts("x", "y")})["a"]
    assert prove_disjoint({"a": _prompts("y", "X!", "x")})["a"] == base
    assert prove_disjoint({"a": _prompts("x", "z")})["a"] != base
    assert prove_disjoint({"a": _prompts("x", "y", label="harmful")})["a"] != base


def test_digest_of_a_split_is_the_same_in_every_process() -> None:
    # Fixed, because manifests written earlier hold it.
    digest = prove_disjoint({"a": _prompts(*(f"request {i}" for i in range(8)))})["a"]
    assert digest == "2005d000a2426b44896c372e67fa5d3d53576c2ccd873dd2b983638d4b235dd0"


def test_empty_split_and_wordless_prompt_are_refused() -> None:
    with pytest.raises(RecipeError, match="no prompt"):
        prove_disjoint({"fit": _prompts("x"), "test": []})
    with pytest.raises(RecipeError, match=r"ours \[1\]"):
        prove_disjoint({"fit": _prompts("x", "?!")})


def test_take_is_stable_under_order_and_grows_as_a_prefix() -> None:
    prompts = _prompts(*(f"request {i}" for i in range(50)))
    ten = [p.index for p in take(prompts, 10, seed=1)]
    assert [p.index for p in take(prompts[::-1], 20, seed=1)][:10] == ten
    assert len(set(ten)) == 10
    assert [p.index for p in take(prompts, 10, seed=2)] != ten


def test_take_counts_equal_prompts_once() -> None:
    assert len(take(_prompts("x", "X", "y"), 2, seed=0)) == 2
    with pytest.raises(RecipeError, match="2 different prompts for a draw of 3"):
        take(_prompts("x", "X", "y"), 3, seed=0)
    with pytest.raises(RecipeError, match="draw of 0"):
        take(_prompts("x"), 0, seed=0)


def test_the_same_request_in_another_wrapping_is_overlap() -> None:
    wrapped = Prompt(
        "Pretend. Name a zebra now", "harmful", "j", 4, goal="name a ZEBRA", family="w"
    )
    with pytest.raises(RecipeError, match=r"ours \[0\] and j \[4\]"):
        prove_disjoint({"fit": _prompts("Name a zebra."), "test": [wrapped]})


def test_one_text_beside_two_pictures_is_two_prompts(tmp_path: Path) -> None:
    names = [Path("a/1.png"), Path("b/1.png"), Path("b/2.png"), b"1", b"2"]
    prompts = [Prompt("look", "harmful", "j", i, image=n, goal="x") for i, n in enumerate(names)]
    assert len({identity(p) for p in prompts}) == 4  # wherever the folder lies, 1.png is 1.png
    assert len(take(prompts, 4, seed=0)) == 4
    both = prove_disjoint({"a": prompts[:1]})["a"], prove_disjoint({"a": prompts[2:3]})["a"]
    assert both[0] != both[1]


def test_a_prompt_with_a_picture_has_one_form_and_is_not_asked_to_be_drawable(
    tmp_path: Path,
) -> None:
    (tmp_path / "list.txt").write_text("Name a tree\nName a bird!\n")
    assert len(collect(["file:list.txt"], "harmless", tmp_path, None, lambda p: "!" not in p)) == 1
    shown = Prompt("What is this?", "harmless", "b", 0, image=b"x", family="f")
    samples = in_forms([shown, *_prompts("x")], ("text", "blank"))
    assert [(s.form, s.image, s.family) for s in samples] == [
        ("text", None, ""),
        ("blank", None, ""),
        ("image", b"x", "f"),
    ]
