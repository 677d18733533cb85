"""Prompts and pictures to fit on and to test with.

A `Sample` is one request in one form. A bake shows the same prompt in three forms: as text alone,
as text beside a blank image, and drawn into the image (typographic, after FigStep, arXiv
2311.05608). An evaluation adds the text beside a natural image. A prompt that comes with a picture
of its own has one form, "image": its words as they were published, beside that picture.

A model that is never asked without a picture has no form "text": its words stand beside a blank
image, in the form that is named so, once (`beside_pictures`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from guardbake.errors import UsageError

Label = Literal["harmful", "harmless"]
Form = Literal["text", "blank", "natural", "typographic", "image"]
FORMS: tuple[Form, ...] = ("text", "blank", "typographic")
"""The forms that a bake draws from words, to fit edits and to choose among them."""
SENSED: tuple[Form, ...] = ("text", "blank", "natural", "typographic")
"""The forms that a gate is calibrated on and that a certificate counts. A gate that has not seen
natural pictures opens on harmless words beside them, or stays shut on harmful ones."""
Picture = Path | bytes
"""A picture as it is stored: a file, or the bytes of one that stands inside another file."""


@dataclass(frozen=True)
class Prompt:
    """One request in words, not yet in a form.

    source, index: where it comes from; index counts from 0 in the unsplit source.
    image: the picture it comes with, None for words alone.
    family: the attack that wraps the request, as its benchmark names it; "" for a plain request.
    goal: the plain request inside the attack; "" if that is the prompt itself.
    The repr leaves the words out, so that no log and no failing test shows a harmful one.
    """

    prompt: str = field(repr=False)
    label: Label
    source: str
    index: int
    image: Picture | None = field(default=None, repr=False)
    family: str = ""
    goal: str = field(default="", repr=False)

    @property
    def request(self) -> str:
        """The plain request, by which splits are compared and answers are judged."""
        return self.goal or self.prompt


@dataclass(frozen=True)
class Sample:
    """One request in one form.

    prompt: the request in words, whatever the form shows it in; kept out of the repr and so out
      of logs.
    source, index: where the prompt comes from; reports name these and never the prompt.
    image: the picture the prompt came with, if and only if the form is "image".
    family, goal: as `Prompt` has them.

    Raises UsageError for form "image" without a picture, and for a picture under another form.
    """

    prompt: str = field(repr=False)
    label: Label
    form: Form
    source: str
    index: int
    image: Picture | None = field(default=None, repr=False)
    family: str = ""
    goal: str = field(default="", repr=False)

    @property
    def request(self) -> str:
        """The plain request, by which an answer is judged."""
        return self.goal or self.prompt

    def __post_init__(self) -> None:
        if (self.form == "image") != (self.image is not None):
            raise UsageError(
                found=f"form {self.form!r} with{'out' if self.image is None else ''} a picture",
                expected='a picture for form "image", and for no other',
                where=f"{self.source} [{self.index}]",
                remedy="give the sample its form",
            )


def beside_pictures(forms: Sequence[Form]) -> tuple[Form, ...]:
    """The forms for a model that is always shown a picture: "blank" in the place of "text", once.

    >>> beside_pictures(("text", "blank", "typographic"))
    ('blank', 'typographic')
    """
    return tuple(dict.fromkeys("blank" if form == "text" else form for form in forms))


def plainest(samples: Sequence[Sample]) -> Form:
    """The form in which the words stand alone: "text", or "blank" where there is none."""
    return "text" if any(sample.form == "text" for sample in samples) else "blank"
