"""Prompts and pictures to fit on and to test with.

A `Sample` is one request in one form. The same prompt usually appears in three forms: as text
alone, as text beside a blank image, and drawn into the image (typographic, after FigStep, arXiv
2311.05608).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Label = Literal["harmful", "harmless"]
Form = Literal["text", "blank", "typographic"]
FORMS: tuple[Form, ...] = ("text", "blank", "typographic")


@dataclass(frozen=True)
class Sample:
    """One request.

    prompt: the request in words, whatever the form shows it in; kept out of the repr and so out
      of logs.
    source, index: where the prompt comes from; reports name these and never the prompt.
    """

    prompt: str = field(repr=False)
    label: Label
    form: Form
    source: str
    index: int
