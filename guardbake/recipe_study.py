"""The recipe's section [study]: how much `guardbake study` asks, and over what it varies."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from guardbake.section import Count, Layer, Positive, Section

StudiedEdit = Literal["steer", "remove", "add", "care"]


class StudySection(Section):
    """Every key has a default, so that a recipe without the section can be studied.

    limit: prompts of each label, at most, drawn by content with `seed`; anchors are drawn from the
    whole fit split, though. tokens: new ones a prompt.
    layers: what is looked at layer by layer; none named is every layer. edits: of the study
    `layers`. ranks, strengths: of the study `scan`. pairs, draws: sizes of the anchor sets, and
    draws of each; ridge: of the direction fitted on them, times tr(C)/d. folds: of the study
    `boundary`. lookalikes: sources among the harmless ones of the test split; none named are those
    of the section evaluate.
    """

    limit: Count = 60
    tokens: Annotated[int, Field(ge=12)] = 12
    seed: Annotated[int, Field(ge=0)] = 0
    layers: list[Layer] = Field(default_factory=list)
    edits: list[StudiedEdit] = Field(default=["steer", "remove"], min_length=1)
    ranks: list[Count] = Field(default=[1, 4, 16], min_length=1)
    strengths: list[Positive] = Field(default=[0.5, 1.0, 2.0, 4.0], min_length=1)
    pairs: list[Annotated[int, Field(ge=2)]] = Field(default=[10, 25, 60, 100], min_length=1)
    draws: Annotated[int, Field(ge=2)] = 20
    ridge: Positive = 30.0
    folds: Annotated[int, Field(ge=2)] = 5
    lookalikes: list[str] = Field(default_factory=list)

    @model_validator(mode="after")
    def _each_once(self) -> StudySection:
        for name in ("layers", "edits", "ranks", "strengths", "pairs", "lookalikes"):
            values = getattr(self, name)
            if len(set(values)) < len(values):
                raise ValueError(f"{name} must not name one twice")
        return self
