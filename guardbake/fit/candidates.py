"""The edits a sign test tries, from the recipe's families of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from guardbake.errors import RecipeError
from guardbake.fit.astra import astra_edit
from guardbake.fit.care import fit_care
from guardbake.fit.contrasts import Contrasts
from guardbake.fit.push import mean_difference_push, refined_push
from guardbake.fit.vlm_guard import safety_direction_edit
from guardbake.recipe import CandidateSection
from guardbake.spec import Edit

_NAMES = {"steer": "mean-difference push", "astra": "ASTRA", "spo": "SPO-VLM"}


@dataclass(frozen=True)
class Candidate:
    """edits: one a site, in layer order, all of gate 0. name: unique among the candidates of a
    recipe. evidence[site]: what the fit says of itself there, JSON values; CARE and ASTRA have any.
    own_gates: whether each edit is to have a gate of its own."""

    name: str
    method: str
    edits: tuple[Edit, ...]
    evidence: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    own_gates: bool = False


def candidates(sections: Sequence[CandidateSection], contrasts: Contrasts) -> Iterator[Candidate]:
    """Every section's layers times its strengths, in the recipe's order.

    Raises RecipeError if two sections name the same candidate, MalformedError if one cannot be
    fitted.
    """
    seen: set[str] = set()
    for section in sections:
        for layers in section.groups:
            fits = [_fit(section, layer, layers, contrasts) for layer in layers]
            evidence = {str(edit.site): seen for edit, seen in fits if seen}
            for strength in section.strengths:
                name = _name(section, layers, strength)
                if name in seen:
                    raise RecipeError(
                        found=f"two candidates named {name!r}",
                        expected="each candidate once",
                        where="fit.candidates",
                        remedy="remove one of the sections, or let them differ",
                    )
                seen.add(name)
                scaled = tuple(_at_strength(edit, strength) for edit, _ in fits)
                own_gates = section.gates == "each"
                yield Candidate(name, _method(section), scaled, evidence, own_gates)


def _fit(
    section: CandidateSection, layer: int, layers: tuple[int, ...], contrasts: Contrasts
) -> tuple[Edit, Mapping[str, object]]:
    """The edit of one of `layers` at strength 1, and its evidence."""
    if section.edit == "care":
        found = fit_care(section, layer, contrasts)
        return found.edit, found.evidence
    if section.edit == "steer":
        return mean_difference_push(contrasts.prompts, layer), {}
    if section.edit == "spo":
        return refined_push(contrasts.refined, layers, layer), {}
    if section.edit == "astra":
        return astra_edit(contrasts, layer)
    kind = "project" if section.edit == "remove" else section.edit
    assert section.rank != "held-out"  # the recipe's own check
    return safety_direction_edit(contrasts.prompts, layer, section.rank, kind), {}


def _at_strength(edit: Edit, strength: float) -> Edit:
    """The edit, fitted at strength 1, at another: in its branches if it has any."""
    if not edit.branches:
        return replace(edit, strength=strength)
    return replace(
        edit, branches=tuple(replace(b, strength=b.strength * strength) for b in edit.branches)
    )


def _name(section: CandidateSection, layers: Sequence[int], strength: float) -> str:
    """What tells candidates apart: "care layer 4 alpha 1, rank 8, fusion sequential"."""
    where = "layers" if len(layers) > 1 else "layer"
    name = f"{section.edit} {where} {'+'.join(map(str, layers))} alpha {strength:g}"
    if section.edit in ("remove", "care") and strength > 1:
        name += " (reflects)"
    options = {
        "gates": section.gates,
        "rank": str(section.rank),
        "ridge": str(section.ridge),
        "branches": " ".join(section.branches),
        "fusion": section.fusion,
        "visual_share": str(section.visual_share),
        "contrast": section.contrast,
        "attribution": "on",
        "winsorise": str(section.winsorise),
        "numerics": section.numerics,
    }
    parts = [
        f"{key.replace('_', ' ')} {value}" for key, value in options.items() if section.is_set(key)
    ]
    return ", ".join([name, *parts])


def _method(section: CandidateSection) -> str:
    """The name of the method that fitted it, for the guard pack."""
    if section.edit in _NAMES:
        return _NAMES[section.edit]
    if section.edit != "care":
        return f"VLM-Guard, {section.edit}"
    name = "CARE as the public code computes it" if section.numerics == "public" else "CARE"
    if len(section.branches) == 1:
        return f"{name}, {section.branches[0]} branch alone"
    return f"{name}, {section.fusion} fusion"
