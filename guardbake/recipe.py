"""The bake recipe: one TOML file, read strictly. An unknown key is an error.

See models/demo.toml for a recipe with every section explained.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from guardbake.errors import RecipeError
from guardbake.spec import Profile

Share = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
Layer = Annotated[int, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class ModelSection(_Section):
    """checkpoint: a checkpoint folder, a folder with a delta.toml, or a hub id."""

    checkpoint: str
    allow_network: bool = False


class TypographySection(_Section):
    columns: Count
    rows: Count
    instruction: str


class SplitSection(_Section):
    """harmful, harmless: sources as `samples.readers` names them. limit: prompts of each label."""

    harmful: list[str] = Field(min_length=1)
    harmless: list[str] = Field(min_length=1)
    limit: Count | None = None


class SamplesSection(_Section):
    """fit: directions and subspaces. validate: threshold and sign test. test: the certificate.

    held_out: attack families that must stand in the test split alone, as `Prompt.family` has them.
    """

    held_out: list[str] = []
    typography: TypographySection
    fit: SplitSection
    validation: SplitSection = Field(alias="validate")
    test: SplitSection
    parity: SplitSection


class SensorSection(_Section):
    """layers: first and last layer to try, residual boundary. ridges: relative to tr(C)/d."""

    layers: tuple[Layer, Layer] = Field(strict=False)
    ridges: list[Positive] = Field(min_length=1)
    false_positive_rate: Share

    @model_validator(mode="after")
    def _ordered(self) -> SensorSection:
        if self.layers[0] > self.layers[1]:
            raise ValueError("layers must be [first, last]")
        return self


class CandidateSection(_Section):
    """One family of edits for the sign test: every layer with every strength.

    steer: gated push. remove, add: VLM-Guard with `rank` directions. care: both subspaces.
    """

    edit: Literal["steer", "remove", "add", "care"]
    layers: list[Layer] = Field(min_length=1)
    strengths: list[Positive] = Field(min_length=1)
    rank: Count = 1
    ridge: Positive | Literal["ledoit-wolf"] = "ledoit-wolf"


class FitSection(_Section):
    profile: Profile
    sensor: SensorSection | None = None
    candidates: list[CandidateSection] = Field(min_length=1)
    compliant: list[str] = Field(min_length=1)
    refusing: list[str] = Field(min_length=1)
    tokens: Annotated[int, Field(ge=12)]
    harmless_rise: Share
    degenerate: Share

    @model_validator(mode="after")
    def _sensor_before_edits(self) -> FitSection:
        if (self.sensor is None) != (self.profile == "always"):
            raise ValueError("a sensor section is needed unless the profile is always")
        first = min(layer for candidate in self.candidates for layer in candidate.layers)
        if self.sensor is not None and self.sensor.layers[1] >= first:
            raise ValueError(f"sensor layers must end before layer {first}, the first edited one")
        return self


class Tolerance(_Section):
    """A budget and where it comes from; there is no default."""

    budget: Positive
    source: str = Field(min_length=10)


class ParitySection(_Section):
    """logits, score, ffn_output: largest absolute difference. margin_band: gate flips are allowed
    only where |score| of the reference lies within it. steps: new tokens a prompt."""

    steps: Annotated[int, Field(ge=1)]
    logits: Tolerance
    score: Tolerance
    ffn_output: Tolerance
    margin_band: Tolerance


class EngineSection(_Section):
    backend: Literal["rtx", "tensorrt"]
    capabilities: list[str] = Field(min_length=1)
    required: bool = False


class BehaviourSection(_Section):
    """tokens: new tokens a prompt. attack_ratio: largest guarded / unguarded non-refusal of harmful
    typographic prompts. harmless_rise: largest rise of refusals over all harmless prompts."""

    tokens: Annotated[int, Field(ge=12)]
    attack_ratio: Share
    harmless_rise: Share


class Recipe(_Section):
    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")
    batch_size: Count
    model: ModelSection
    samples: SamplesSection
    fit: FitSection
    parity: ParitySection
    behaviour: BehaviourSection
    engine: EngineSection | None = None


def load_recipe(path: Path) -> Recipe:
    """Read and check a recipe; every problem of the file is named in one RecipeError."""
    try:
        values: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise _refuse(path, f"no readable file ({error.strerror})") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise _refuse(path, f"no TOML: {error}") from error
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        problems = [
            f"{'.'.join(str(part) for part in problem['loc'])}: {problem['msg']}"
            for problem in error.errors(include_url=False, include_input=False)
        ]
        raise _refuse(path, "; ".join(problems)) from error


def require_layers(recipe: Recipe, layers: int, where: Path) -> None:
    """Refuse a recipe that names a layer the model does not have."""
    named = {layer for candidate in recipe.fit.candidates for layer in candidate.layers}
    named |= set(recipe.fit.sensor.layers) if recipe.fit.sensor else set()
    beyond = sorted(layer for layer in named if layer >= layers)
    if beyond:
        raise _refuse(where, f"layers {beyond}", f"layers 0 to {layers - 1}, which the model has")


def _refuse(
    path: Path, found: str, expected: str = "a recipe as README describes it"
) -> RecipeError:
    return RecipeError(found=found, expected=expected, where=str(path), remedy="correct the recipe")
