"""What a VLM is asked for a sample of each form."""

from __future__ import annotations

from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from guardbake.errors import MalformedError
from guardbake.samples import Sample
from guardbake.vlm.requests import Typography

DRAWING = Typography(2, 1, "Answer the image.")


def _words(text: str, **_: Any) -> dict[str, Any]:
    """A tokenizer of one token a word."""
    starts = [i for i in range(len(text)) if text[i] == " "] + [len(text)]
    spans = list(pairwise(starts))
    return {"input_ids": list(range(len(spans))), "offset_mapping": spans}


def test_a_drawn_form_asks_the_cleaned_words_and_a_published_picture_its_own(
    tmp_path: Path,
) -> None:
    text, _ = DRAWING.request(Sample("Name it: a?", "harmless", "text", "x", 0), _words)
    assert text == "Name it a"
    Image.new("RGB", (5, 7), "red").save(tmp_path / "a.png")
    own = Sample("Name it: a?", "harmless", "image", "x", 0, tmp_path / "a.png")
    text, picture = DRAWING.request(own, _words)
    assert text == "Name it: a?"
    assert picture is not None
    assert (picture.size, picture.getpixel((0, 0))) == ((5, 7), (255, 0, 0))


def test_a_natural_picture_has_the_drawn_ones_size_and_goes_by_the_words() -> None:
    first, again, other = (
        DRAWING.request(Sample(text, "harmless", "natural", source, 0), _words)
        for text, source in (("Name it", "x"), ("Name it!", "y"), ("Name that", "x"))
    )
    assert first[0] == again[0] == "Name it"
    pictures = [picture for _, picture in (first, again, other) if picture is not None]
    assert [picture.size for picture in pictures] == [(96, 48)] * 3
    assert pictures[0].tobytes() == pictures[1].tobytes() != pictures[2].tobytes()


def test_a_picture_that_cannot_be_read_is_named_by_source_and_index() -> None:
    cut = BytesIO()
    Image.effect_noise((40, 40), 9).save(cut, "PNG")
    sample = Sample("x", "harmful", "image", "mini", 3, cut.getvalue()[:200])
    with pytest.raises(MalformedError, match=r"mini \[3\]"):
        DRAWING.request(sample, _words)
