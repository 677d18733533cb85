"""Options that several commands have."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class ProgressStyle(StrEnum):
    auto = "auto"
    bar = "bar"
    plain = "plain"
    json = "json"


class NumberType(StrEnum):
    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


Out = Annotated[
    Path, typer.Option("-o", "--out", help="What to write; appears whole or not at all.")
]
ProgressOption = Annotated[ProgressStyle, typer.Option("--progress", help="How to show progress.")]
