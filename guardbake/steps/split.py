"""The samples of a recipe, proved disjoint before anything is fitted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from guardbake.errors import RecipeError
from guardbake.recipe import Recipe, SplitSection
from guardbake.samples import FORMS, Form, Prompt, Sample, beside_pictures
from guardbake.samples.collect import collect, in_forms
from guardbake.samples.splits import prove_disjoint, prove_held_out
from guardbake.samples.typography import Tokenizer
from guardbake.vlm.requests import Typography, drawable


@dataclass(frozen=True)
class Splits:
    """prompts[split]: usable prompts, harmful first. digests[split]: sha256 in hexadecimal.

    Beside the recipe's splits, "calibrate" is validate with all of its harmless prompts: a gate's
    threshold needs more of them than can be answered under every candidate.
    imageless: whether the model can be asked in words alone; if not, its forms are those of
    `beside_pictures`.
    """

    prompts: Mapping[str, Sequence[Prompt]]
    digests: Mapping[str, str]
    imageless: bool = True

    def forms(self, wanted: Sequence[Form]) -> tuple[Form, ...]:
        """Those of them that the model can be asked in."""
        return tuple(wanted) if self.imageless else beside_pictures(wanted)

    def samples(self, split: str, forms: Sequence[Form] = FORMS) -> list[Sample]:
        return in_forms(self.prompts[split], self.forms(forms))


def split_samples(
    recipe: Recipe,
    root: Path,
    typography: Typography,
    tokenizer: Tokenizer,
    imageless: bool = True,
) -> Splits:
    """Read every split. fit, validate and test must not share a request, and a held-out family
    stands in test alone; parity prompts, on which nothing is fitted or judged, may come from any of
    them."""
    samples = recipe.samples
    sections = {
        "fit": samples.fit,
        "validate": samples.validation,
        "test": samples.test,
        "parity": samples.parity,
    }

    def usable(prompt: str) -> bool:
        return drawable(prompt, typography, tokenizer)

    prompts = {
        name: _both_labels(section, root, usable, name) for name, section in sections.items()
    }
    prompts["calibrate"] = _calibrating(prompts["validate"], samples.validation, root, usable)
    for name in ("fit", "validate", "calibrate"):
        _demand_pictures_of_both_labels(prompts[name], name)
    apart = {name: prompts[name] for name in ("fit", "validate", "test")}
    prove_held_out(samples.held_out, apart)
    digests = prove_disjoint(apart | {"validate": prompts["calibrate"]})
    digests["calibrate"] = digests.pop("validate")
    digests |= prove_disjoint({"validate": prompts["validate"]})
    digests |= prove_disjoint({"parity": prompts["parity"]})
    return Splits(prompts, digests, imageless)


def _calibrating(
    validate: Sequence[Prompt], section: SplitSection, root: Path, usable: Callable[[str], bool]
) -> list[Prompt]:
    harmful = [prompt for prompt in validate if prompt.label == "harmful"]
    return harmful + collect(section.harmless, "harmless", root, None, usable)


def _both_labels(
    section: SplitSection, root: Path, usable: Callable[[str], bool], name: str
) -> list[Prompt]:
    harmful = collect(section.harmful, "harmful", root, section.limit, usable)
    harmless = collect(section.harmless, "harmless", root, section.limit, usable)
    for label, found in (("harmful", harmful), ("harmless", harmless)):
        if not found:
            raise RecipeError(
                found=f"no usable {label} prompt",
                expected="prompts that fit into the typographic image",
                where=f"samples.{name}",
                remedy="name other sources, or draw with more cells",
            )
    return harmful + harmless


def _demand_pictures_of_both_labels(prompts: Sequence[Prompt], name: str) -> None:
    """A threshold holds for prompts of the form it was set on, harmful and harmless alike."""
    labels = {prompt.label for prompt in prompts if prompt.image is not None}
    if len(labels) == 1:
        raise RecipeError(
            found=f"prompts with pictures of their own that are all {labels.pop()}",
            expected="harmless ones beside harmful ones",
            where=f"samples.{name}",
            remedy="add the other label, such as mmbench:<path>, or take these prompts out",
        )
