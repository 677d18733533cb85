"""The bake recipe: one TOML file, read strictly. An unknown key is an error.

See models/demo.toml for a recipe with every section explained.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, ValidationError, model_validator

from guardbake.errors import RecipeError
from guardbake.recipe_diagnose import DiagnoseSection
from guardbake.recipe_engine import EngineSection, ExportSection, Half
from guardbake.recipe_evaluate import EvaluateSection
from guardbake.recipe_study import StudySection
from guardbake.section import Count, Layer, Positive, Share, Weight
from guardbake.section import Section as _Section
from guardbake.semantics import Fusion
from guardbake.spec import Modality, Profile

MAX_BYTES = 1 << 20  # recipes are kilobytes


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

    held_out: list[str] = Field(default_factory=list)
    typography: TypographySection
    fit: SplitSection
    validation: SplitSection = Field(alias="validate")
    test: SplitSection
    parity: SplitSection


class SensorSection(_Section):
    """layers: first and last layer that may be read, residual boundary. readings: most layers read
    together. ridges: relative to tr(C)/d. pooling: weights to try for the mean over image tokens
    beside the last token; with any, requests with an image have a threshold of their own."""

    layers: tuple[Layer, Layer] = Field(strict=False)
    readings: Count = 1
    ridges: list[Positive] = Field(min_length=1)
    pooling: list[Weight] = Field(default_factory=list)
    false_positive_rate: Share

    @model_validator(mode="after")
    def _ordered(self) -> SensorSection:
        if self.layers[0] > self.layers[1]:
            raise ValueError("layers must be [first, last]")
        return self


class CandidateSection(_Section):
    """One family of edits for the sign test: every layer with every strength.

    steer: gated push. remove, add, replace: VLM-Guard with `rank` directions; replace needs a pass
    over the text alone for every request. care: CARE's subspaces. astra, spo: those papers'
    vectors, fitted as the section fit.rivals says; spo refines a candidate's vectors together.
    together: one candidate edits all of `layers`, instead of one candidate a layer. gates: one for
    all edits, by the fit's sensor; or each layer has its own, by the residual that enters it. Each
    of these keeps the false-positive rate, so together they open for more harmless prompts than one
    does: the sign test sees what that costs. rival: fitted for `guardbake evaluate` alone, behind
    the chosen guard's first gate; no sign test tries it and no bake ships it. The rest is CARE's:
    which branches; their fusion, and the visual one's share of a parallel fusion; what harmful
    pictures are held against; whether attribution picks the tokens; the share of each tail that is
    winsorised; whose numerics. rank and ridge "held-out": by `fit.selection`.
    """

    edit: Literal["steer", "remove", "add", "replace", "care", "astra", "spo"]
    layers: list[Layer] = Field(min_length=1)
    strengths: list[Positive] = Field(min_length=1)
    together: bool = False
    rival: bool = False
    gates: Literal["one", "each"] = "one"
    rank: Count | Literal["held-out"] = 1
    ridge: Positive | Literal["ledoit-wolf", "held-out"] = "ledoit-wolf"
    branches: tuple[Modality, ...] = Field(default=("visual", "text"), strict=False)
    fusion: Fusion = "adaptive"
    visual_share: Share = 0.5
    contrast: Literal["typographic", "plain"] = "typographic"
    attribution: bool = False
    winsorise: Annotated[float, Field(ge=0.0, lt=0.5)] = 0.0
    numerics: Literal["exact", "public"] = "exact"

    @model_validator(mode="after")
    def _makes_sense(self) -> CandidateSection:
        for name, values in (("layers", self.layers), ("strengths", self.strengths)):
            if len(set(values)) < len(values):
                raise ValueError(f"{name} names one twice")
        if self.together and len(self.layers) == 1:
            raise ValueError("together needs more than one layer")
        if self.rival and self.gates == "each":
            raise ValueError("a rival stands behind the chosen guard's gate, not its own")
        if self.edit in ("steer", "astra", "spo") and self.is_set("rank"):
            raise ValueError(f"rank is of no meaning for {self.edit}")
        if self.edit != "care":
            self._refuse_set(_CARE_ALONE, "are for care alone")
            if self.rank == "held-out":
                raise ValueError("rank must be a number but for care")
            return self
        if self.branches not in (("visual", "text"), ("visual",), ("text",)):
            raise ValueError('branches must be ["visual", "text"], ["visual"] or ["text"]')
        if len(self.branches) == 1:
            self._refuse_set(("fusion", "visual_share"), "need both branches")
        if self.fusion != "parallel":
            self._refuse_set(("visual_share",), "is for fusion parallel alone")
        if "visual" not in self.branches:
            self._refuse_set(("contrast",), "is the visual branch's")
        if self.numerics == "public":
            self._refuse_set(("ridge",), "is 1e-6 absolute with public numerics")
            self._refuse_set(("winsorise",), "is nothing the public numerics do")
            if self.rank == "held-out":
                raise ValueError("rank must be a number with public numerics")
        return self

    @property
    def groups(self) -> list[tuple[int, ...]]:
        """The layers of each candidate, sorted."""
        return [tuple(sorted(self.layers))] if self.together else [(n,) for n in self.layers]

    def is_set(self, name: str) -> bool:
        """Whether a key has another value than its default."""
        return bool(getattr(self, name) != type(self).model_fields[name].default)

    def _refuse_set(self, names: tuple[str, ...], why: str) -> None:
        wrong = [name for name in names if self.is_set(name)]
        if wrong:
            raise ValueError(f"{', '.join(wrong)} {why}")


_CARE_ALONE = (
    "ridge",
    "branches",
    "fusion",
    "visual_share",
    "contrast",
    "attribution",
    "winsorise",
    "numerics",
)


class RivalsSection(_Section):
    """What the candidates astra and spo are fitted with.

    pictures: harmful pictures, at most, whose tokens ASTRA ablates. exchanges: prompts of each
    label, at most, over which SPO-VLM prefers one answer to another; steps of Adam, each on `batch`
    of either label, at `rate` of a vector's length; seed: of their order.
    """

    pictures: Count = 16
    exchanges: Count = 96
    steps: Count = 40
    batch: Count = 4
    rate: Positive = 0.05
    seed: Annotated[int, Field(ge=0)] = 0


class FitSection(_Section):
    """compliant, refusing: assistant turns of CARE's text contrast. captions: what is asked beside
    plain pictures, for candidates of contrast "plain"."""

    profile: Profile
    sensor: SensorSection | None = None
    candidates: list[CandidateSection] = Field(min_length=1)
    compliant: list[str] = Field(min_length=1)
    refusing: list[str] = Field(min_length=1)
    captions: list[str] = Field(default_factory=list)
    tokens: Annotated[int, Field(ge=12)]
    harmless_rise: Share
    degenerate: Share
    rivals: RivalsSection = RivalsSection()

    @property
    def contest(self) -> FitSection:
        """The section without rivals: what a bake fits."""
        return self._with([c for c in self.candidates if not c.rival])

    @property
    def rivalry(self) -> FitSection:
        """The section with rivals alone, maybe none."""
        return self._with([c for c in self.candidates if c.rival])

    def _with(self, candidates: list[CandidateSection]) -> FitSection:
        return self.model_copy(update={"candidates": candidates})

    @model_validator(mode="after")
    def _contested(self) -> FitSection:
        if all(candidate.rival for candidate in self.candidates):
            raise ValueError("candidates must hold one that is no rival")
        return self

    @model_validator(mode="after")
    def _captions_for_plain(self) -> FitSection:
        if not self.captions and any(c.contrast == "plain" for c in self.candidates):
            raise ValueError("captions must say what is asked beside the plain pictures")
        return self

    @model_validator(mode="after")
    def _sensor_before_edits(self) -> FitSection:
        if (self.sensor is None) != (self.profile == "always"):
            raise ValueError("a sensor section is needed unless the profile is always")
        edited: dict[str, set[int]] = {"one": set(), "each": set()}
        for candidate in self.candidates:
            edited[candidate.gates].update(candidate.layers)
        if self.sensor is None and edited["each"]:
            raise ValueError('gates = "each" needs a sensor section')
        if 0 in edited["each"]:
            raise ValueError("layer 0 has no gate of its own: no residual enters it")
        first = min(edited["one"], default=None)
        if self.sensor is not None and first is not None and self.sensor.layers[1] >= first:
            raise ValueError(f"sensor layers must end before layer {first}, the first edited one")
        if self.sensor is not None and self.sensor.pooling and self.profile != "sequence":
            raise ValueError("sensor.pooling needs the profile sequence, which carries its memory")
        return self


class Tolerance(_Section):
    """A budget and where it comes from; there is no default."""

    budget: Positive
    source: str = Field(min_length=10)


class ParitySection(_Section):
    """logits, score, ffn_output: largest absolute difference. margin_band: gate flips are allowed
    only where |score| of the reference lies within it. steps: new tokens a prompt.

    Budgets are for float32; what computes in half precision is held to multiples of the reference's
    own noise in it, as many as `noise` allows (`check.floors`). A gate of the certificate whose
    budget is left out is not asked. law: of a guard node alone, the
    largest share of what float32 rounding explains. cosine, norm_ratio: largest 1 - cosine and
    |norm ratio - 1| of what reaches the guard and of what leaves it. kl: nats, of one new token.
    top1, top5: share of the likeliest tokens. noise: distance of the logits, in multiples of the
    reference's own distance from itself in the same precision. cache: largest absolute difference
    of logits between ways of feeding one text.
    """

    steps: Annotated[int, Field(ge=1)]
    logits: Tolerance
    score: Tolerance
    ffn_output: Tolerance
    margin_band: Tolerance
    law: Tolerance | None = None
    cosine: Tolerance | None = None
    norm_ratio: Tolerance | None = None
    kl: Tolerance | None = None
    top1: Tolerance | None = None
    top5: Tolerance | None = None
    noise: Tolerance | None = None
    cache: Tolerance | None = None


class RunnersSection(_Section):
    """The exported graph is asked as well: `limit` prompts of each label and form. budget: largest
    share of them that it refuses and the reference does not, or the other way."""

    limit: Count
    budget: Share
    source: str = Field(min_length=10)


class BehaviourSection(_Section):
    """tokens: new tokens a prompt. attack_ratio: largest guarded / unguarded non-refusal of harmful
    typographic prompts. harmless_rise: largest rise of refusals over all harmless prompts. source:
    where these two budgets come from. runners: left out, only the PyTorch reference is asked."""

    tokens: Annotated[int, Field(ge=12)]
    attack_ratio: Share
    harmless_rise: Share
    source: str = Field(min_length=10)
    runners: RunnersSection | None = None


class Recipe(_Section):
    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")
    batch_size: Count
    model: ModelSection
    samples: SamplesSection
    diagnose: DiagnoseSection | None = None
    fit: FitSection
    parity: ParitySection
    behaviour: BehaviourSection
    export: ExportSection = ExportSection()
    engine: EngineSection | None = None
    evaluate: EvaluateSection | None = None
    study: StudySection | None = None

    @property
    def halves(self) -> list[Half]:
        """The half precisions that something of the bundle computes in."""
        named = {self.export.number, self.engine.number if self.engine else None}
        return [number for number in get_args(Half) if number in named]

    @model_validator(mode="after")
    def _halves_make_sense(self) -> Recipe:
        if self.halves and self.parity.noise is None:
            raise ValueError(
                "parity.noise must say how many times the reference's own noise is allowed: the "
                f"budgets of {self.halves[0]} are multiples of it"
            )
        engine = self.engine and self.engine.number
        if self.export.number != "float32" and engine not in (None, self.export.number):
            raise ValueError(f"engine.number must be {self.export.number} or left out, as exported")
        return self


def load_recipe(path: Path) -> Recipe:
    """Read and check a recipe; every problem of the file is named in one RecipeError."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise _refuse(path, f"no readable file ({error.strerror})") from error
    if len(data) > MAX_BYTES:
        raise _refuse(path, f"{len(data)} bytes", f"at most {MAX_BYTES}")
    try:
        values: dict[str, Any] = tomllib.loads(data.decode())
    except ValueError as error:  # no UTF-8, no TOML, or a number of thousands of digits
        raise _refuse(path, f"no TOML: {error}") from error
    except RecursionError as error:
        raise _refuse(path, "TOML nested too deeply") from error
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
