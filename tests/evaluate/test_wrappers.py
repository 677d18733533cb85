"""Requests in other words and beside other pictures."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from guardbake.errors import MalformedError, RecipeError
from guardbake.evaluate.attacks.wrappers import (
    PLACE,
    Photographed,
    Pictured,
    Templated,
    photographs,
    read_templates,
)
from guardbake.samples import Sample
from guardbake.vlm.catalog import models_root
from guardbake.vlm.requests import Typography

DRAWING = Typography(3, 2, "Answer the image.")


def words(text: str, **_: Any) -> dict[str, Any]:
    """A tokenizer of one token a word."""
    starts = [i for i in range(len(text)) if text[i] == " "] + [len(text)]
    spans = list(pairwise(starts))
    return {"input_ids": list(range(len(spans))), "offset_mapping": spans}


def sample(prompt: str, index: int = 0) -> Sample:
    return Sample(prompt, "harmless", "text", "ours", index)


def test_every_template_is_used_and_a_request_keeps_its_own() -> None:
    asking = Templated(DRAWING, ["one {request}", "two {request}", "three {request}"])
    texts = [asking.request(sample(f"bake cake {n}"), words)[0] for n in range(40)]
    assert {text.split()[0] for text in texts} == {"one", "two", "three"}
    assert all(text.endswith(f"bake cake {n}") for n, text in enumerate(texts))
    assert texts == [asking.request(sample(f"bake cake {n}"), words)[0] for n in range(40)]


def test_a_picture_is_shown_as_it_was_found() -> None:
    pictures = {("ours", n): np.full((96, 144, 3), n, np.uint8) for n in range(2)}
    text, shown = Pictured(DRAWING, pictures).request(sample("bake a cake", 1), words)
    assert text == "bake a cake"
    assert shown is not None
    assert (np.asarray(shown) == pictures["ours", 1]).all()


def test_photographs_are_cropped_to_the_drawn_size(tmp_path: Path) -> None:
    for n, size in enumerate([(300, 80), (50, 400)]):
        Image.effect_noise(size, 80).convert("RGB").save(tmp_path / f"{n}.png")
    (tmp_path / "notes.txt").write_text("no picture")
    files = photographs(tmp_path)
    assert [path.name for path in files] == ["0.png", "1.png"]
    asking = Photographed(DRAWING, files)
    shown = [asking.request(sample(f"cake {n}"), words) for n in range(12)]
    assert [text for text, _ in shown] == [f"cake {n}" for n in range(12)]
    pictures = [picture.tobytes() for _, picture in shown if picture is not None]
    assert {picture.size for _, picture in shown if picture is not None} == {(144, 96)}
    assert len(set(pictures)) > 6
    again = asking.request(sample("cake 0"), words)[1]
    assert again is not None
    assert again.tobytes() == pictures[0]


def test_a_folder_without_photographs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no photograph"):
        photographs(tmp_path)


def test_our_templates_are_of_the_four_families_and_hold_one_place() -> None:
    families = read_templates(models_root() / "prompts" / "templates.toml")
    assert sorted(families) == ["fiction", "persona", "prefix-injection", "refusal-suppression"]
    for texts in families.values():
        assert len(set(texts)) == len(texts) >= 3
        assert all(text.count(PLACE) == 1 for text in texts)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("x = ", "no TOML"),
        ("", "no family"),
        ("[a]\nsource = 's'", "other keys in 'a'"),
        ("a = 1", "other keys in 'a'"),
        ("[a]\nsource = 's'\ntemplates = []", "no templates in 'a'"),
        ("[a]\nsource = 's'\ntemplates = ['b']", "without exactly one"),
        ("[a]\nsource = 's'\ntemplates = [1]", "without exactly one"),
    ],
)
def test_malformed_templates_are_refused(tmp_path: Path, text: str, found: str) -> None:
    path = tmp_path / "t.toml"
    path.write_text(text)
    with pytest.raises(MalformedError, match=found):
        read_templates(path)


def test_absent_templates_are_a_recipe_s_fault(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"evaluate\.templates"):
        read_templates(tmp_path / "t.toml")
