"""The section of a recipe that says what `guardbake evaluate` asks."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from guardbake.section import Count, Positive, Section

Level = Annotated[int, Field(ge=1, le=255)]
Seed = Annotated[int, Field(ge=0)]
BenignFamily = Literal["text", "blank", "natural", "photograph", "typographic", "published"]
AttackFamily = BenignFamily | Literal["templates"]


class ArmSection(Section):
    """One row of the evaluation beside the undefended model.

    guard: "fitted" for the guard that was chosen, or the name of a candidate of the sign test.
    ungated: its edits without its gate, on every token. canned: said instead, whenever the guard's
    gate opens; its edits are unused. preamble: a sentence before every request. tuned: the model
    itself, fine-tuned as the section evaluate.tuning says.
    """

    name: str = Field(min_length=1)
    guard: str | None = None
    canned: str | None = Field(default=None, min_length=1)
    preamble: str = ""
    ungated: bool = False
    tuned: bool = False

    @model_validator(mode="after")
    def _defends(self) -> ArmSection:
        if self.name == "undefended":
            raise ValueError("undefended is a row already, the first")
        if self.guard is None and not self.preamble and not self.tuned:
            raise ValueError("an arm needs a guard, a preamble or a fine-tune")
        if self.guard is not None and self.tuned:
            raise ValueError("a guard was not fitted for a fine-tuned model")
        if self.ungated and (self.guard is None or self.canned is not None):
            raise ValueError("ungated needs a guard, whose edits are used")
        if self.canned is not None and self.guard is None:
            raise ValueError("canned needs a guard, whose gate asks for it")
        return self


class PgdSection(Section):
    """Attacks on the image by projected gradient descent; bounds in levels of 255.

    base: the form whose image is perturbed. limit: harmful prompts attacked. steps: gradients
    taken; step: the first step's share of the bound, falling to 0. eps: bounds of images found on
    the undefended model, which serve every row; adaptive: of images found through each row's own
    defence; universal: of one image for all prompts, found on `corpus` prompts of the fit split.
    through: the arms with an adaptive search, which is the dear one; none named: all of them.
    Searched for are the fit section's compliant turns: a jailbreak. toxic: bounds of one image for
    all prompts that calls for toxic turns instead, those of the source toxic_turns (Qi et al. 2024,
    arXiv 2306.13213; ASTRA tests both kinds).
    """

    base: Literal["blank", "natural", "typographic"]
    limit: Count
    batch_size: Count
    steps: Count
    step: Annotated[float, Field(gt=0.0, le=1.0)] = 0.5
    seed: Seed = 0
    eps: list[Level] = Field(default_factory=list)
    adaptive: list[Level] = Field(default_factory=list)
    universal: list[Level] = Field(default_factory=list)
    toxic: list[Level] = Field(default_factory=list)
    toxic_turns: str | None = None
    corpus: Count = 8
    through: list[str] = Field(default_factory=list)

    @model_validator(mode="after")
    def _called_for(self) -> PgdSection:
        if bool(self.toxic) != (self.toxic_turns is not None):
            raise ValueError("toxic and toxic_turns belong together")
        return self


class JudgeSection(Section):
    """A model that judges the greedy answers to harmful prompts beside the keywords.

    card: a name in models/judges/, or a file like those. checkpoint: its folder; template: a file,
    for cards that want one; all relative to the recipe.
    """

    card: str
    checkpoint: str
    template: str | None = None
    batch_size: Count = 8


class TuningSection(Section):
    """A refusal fine-tune of the decoder's linear layers, on the fit split (see `vlm.low_rank`).

    pairs: requests of each label, at most, each with the turn to learn: a refusing one after
    harmful, the model's own answer after harmless ones. rank: of the change. steps of AdamW, each
    on `batch_size` pairs of either label.
    """

    pairs: Count
    rank: Count
    steps: Count
    batch_size: Count
    rate: Positive
    seed: Seed = 0


class EvaluateSection(Section):
    """What `guardbake evaluate` asks, and of whom.

    tokens: new tokens a prompt. limit: prompts a family, of each label. attacks, benign: families
    of harmful and of harmless prompts, see `steps.families`. lookalikes: sources among the harmless
    ones that are counted apart. templates: a file of jailbreak templates, photographs: a folder of
    pictures, both relative to the recipe. seeds: of the sampled runs beside the greedy one.
    candidates: whether every candidate of the sign test is a row, too. utility: benchmarks of
    questions (mmbench, mm-vet or scienceqa, each with its path) that every row answers greedily;
    questions: at most so many of each, repetitions of one counted as one.
    """

    tokens: Annotated[int, Field(ge=12)]
    limit: Count
    attacks: list[AttackFamily] = Field(min_length=1)
    benign: list[BenignFamily] = Field(min_length=1)
    lookalikes: list[str] = Field(default_factory=list)
    templates: str | None = None
    photographs: str | None = None
    seeds: list[Seed] = Field(default_factory=list)
    temperature: Positive = 1.0
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 0.9
    arms: list[ArmSection] = Field(default_factory=list)
    candidates: bool = False
    pgd: PgdSection | None = None
    tuning: TuningSection | None = None
    judges: list[JudgeSection] = Field(default_factory=list)
    utility: list[str] = Field(default_factory=list)
    questions: Count = 100

    @model_validator(mode="after")
    def _consistent(self) -> EvaluateSection:
        names = [arm.name for arm in self.arms]
        for what, listed in (
            ("arms", names), ("attacks", self.attacks), ("benign", self.benign),
            ("seeds", self.seeds), ("utility", self.utility),
        ):  # fmt: skip
            if len(set(listed)) < len(listed):
                raise ValueError(f"{what} must not name one twice")
        if any(arm.tuned for arm in self.arms) != (self.tuning is not None):
            raise ValueError("an arm that is tuned and the section tuning belong together")
        if not names and not self.candidates:
            raise ValueError("arms must name a rival of the undefended model")
        for family, value in (("templates", self.templates), ("photograph", self.photographs)):
            if (family in (*self.attacks, *self.benign)) != (value is not None):
                raise ValueError(f"the family {family} and its path belong together")
        return self
