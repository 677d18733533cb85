"""The edits a sign test tries, from the recipe's families of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from guardbake.activations import Activations, Rows
from guardbake.fit.care import care_edit
from guardbake.fit.push import mean_difference_push
from guardbake.fit.vlm_guard import safety_direction_edit
from guardbake.recipe import CandidateSection
from guardbake.site import Site
from guardbake.spec import Edit


@dataclass(frozen=True)
class Candidate:
    name: str
    method: str
    edit: Edit


@dataclass(frozen=True, eq=False)
class Answers:
    """compliant[site], refusing[site]: [N, d] float32, forced turns after harmful prompts."""

    compliant: Mapping[Site, Rows]
    refusing: Mapping[Site, Rows]


def candidates(
    sections: Sequence[CandidateSection], fitting: Activations, answers: Answers
) -> Iterator[Candidate]:
    """Every section's layers times its strengths, in the recipe's order."""
    for section in sections:
        for layer in section.layers:
            for strength in section.strengths:
                name = f"{section.edit} layer {layer} alpha {strength:g}"
                yield Candidate(
                    name, _METHOD[section.edit], _edit(section, layer, strength, fitting, answers)
                )


_METHOD = {
    "steer": "gated mean-difference push",
    "remove": "VLM-Guard, remove",
    "add": "VLM-Guard, add",
    "care": "CARE, adaptive fusion",
}


def _edit(
    section: CandidateSection, layer: int, strength: float, fitting: Activations, answers: Answers
) -> Edit:
    if section.edit == "steer":
        return mean_difference_push(fitting, layer, strength)
    if section.edit == "care":
        site = Site(layer, "ffn_output")
        return care_edit(
            fitting,
            answers.compliant[site],
            answers.refusing[site],
            layer,
            section.rank,
            strength,
            section.ridge,
        )
    kind: Literal["project", "add"] = "project" if section.edit == "remove" else "add"
    return safety_direction_edit(fitting, layer, section.rank, kind, strength)
