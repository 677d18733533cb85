"""What a report reads of each record; other keys are left alone, and never shown.

A value of another type, a number that is not finite and a missing key are errors.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from guardbake.component import ComponentName, Kind, Part
from guardbake.report.blocks import Grid
from guardbake.report.plots import Plot
from guardbake.samples import Label

Named = dict[str, float]
"""Numbers by name, such as one a form."""


class _Record(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True, strict=True, allow_inf_nan=False)


class Interval(_Record):
    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"


class Rate(Interval):
    count: int
    total: int

    def __str__(self) -> str:
        return f"{super().__str__()} ({self.count}/{self.total})"


class Sampled(_Record):
    over_runs: Interval


class Row(_Record):
    label: Label
    family: str
    arm: str
    refused: Rate
    answered: Rate
    degenerate: Rate
    sampled: dict[str, Sampled] = Field(default_factory=dict)


class Pairing(_Record):
    label: Label
    family: str
    arm: str
    gained: int
    lost: int
    p_holm: float


class Table(_Record):
    rows: list[Row] = Field(min_length=1)
    pairings: list[Pairing]


class Candidate(_Record):
    candidate: str
    rise: float
    refused_because: list[str]
    refused_harmful: Named
    refused_harmless: Named
    degenerate: Named


class Undefended(_Record):
    refused_harmful: Named
    refused_harmless: Named


class Place(_Record):
    site: str
    forms: dict[str, Named]


class Fit(_Record):
    """sensors: of each, figures by name, as its fit leaves them; shown as they are."""

    chosen: str
    sensors: list[dict[str, Any]]
    undefended: Undefended
    sign_test: list[Candidate] = Field(min_length=1)
    separability: list[Place]


class Comparison(_Record):
    quantity: str
    worst: float | str
    limit: float | None
    compared: int
    where: str
    source: str
    passed: bool


class Parity(_Record):
    passed: bool
    comparisons: list[Comparison]
    flips_in_band: int
    decisions: int


class Ratio(_Record):
    value: float
    budget: float


class Rises(_Record):
    value: Named
    budget: float


class Behaviour(_Record):
    table: Table
    attack_ratio: Ratio
    harmless_rise: Rises
    passed: bool


class Arm(_Record):
    name: str
    guard: str | None


class Cost(_Record):
    arm: str
    family: str
    prompts: int
    tokens: int
    perplexity: float
    ratio: Interval
    divergence: Interval


class Search(_Record):
    kind: str
    arm: str
    eps: int
    prompts: int
    surprise_before: float
    surprise_after: float


class Agreement(_Record):
    same: Rate
    kappa: float | None


class Judge(_Record):
    """A model judge's counts of the greedy answers to harmful prompts."""

    name: str
    rows: list[Row] = Field(min_length=1)
    agreement: Agreement


class Settings(_Record):
    tokens: int
    seeds: list[int]


class Evaluation(_Record):
    recipe: str
    model: str
    samples: dict[str, str]
    arms: list[Arm]
    settings: Settings
    fitted_on: list[str]
    validated_on: list[str]
    table: Table
    judges: list[Judge] = Field(default_factory=list)
    costs: list[Cost]
    searches: list[Search]


class Ranks(_Record):
    layer: int
    cause: Interval
    separability: float
    ranks: list[int] | None = Field(min_length=2, max_length=2)


class Choice(_Record):
    rule: str
    decided_by: str
    layers: list[int]
    evidence: list[Ranks] = Field(min_length=1)


class Effect(_Record):
    part: Part
    kind: Kind
    layer: int
    cause: Interval
    divergence: Interval
    attack_rise: Interval | None = None


class Cause(_Record):
    effects: list[Effect]


class Separation(_Record):
    auc: float
    silhouette: float
    scatter_ratio: float
    mahalanobis: float


class Component(_Record):
    layer: int
    component: ComponentName
    forms: dict[str, Separation]


class Traced(_Record):
    kinds: list[Kind]


class Diagnosis(_Record):
    model: str
    samples: str
    section: Traced
    choice: Choice
    causes: dict[str, Cause]
    separability: list[Component] = Field(min_length=1)

    @model_validator(mode="after")
    def _same_forms(self) -> Diagnosis:
        if len({tuple(sorted(place.forms)) for place in self.separability}) > 1:
            raise ValueError("separability in other forms at other places")
        return self


class Gate(_Record):
    name: str
    status: Literal["pass", "fail", "not asked"]
    detail: str


class Digests(_Record):
    model: str
    guard: str
    onnx: dict[str, str]


class Certificate(_Record):
    """figures: the records behind the gates, some of them as files of their own beside it."""

    name: str
    verdict: str
    gates: list[Gate]
    digests: Digests
    figures: dict[str, Any]


class Study(_Record):
    """What a study leaves: its words, its table and its plots are in the record."""

    study: str
    question: str
    model: str
    finding: list[str] = Field(min_length=1)
    table: Grid
    plots: list[Annotated[Plot, Field(discriminator="kind")]]
