"""CARE's dual-modal subspaces (arXiv 2603.27240), fitted on the tensor that is edited.

Visual: pictures that carry a harmful request, against pictures that carry a harmless one (contrast
"typographic", same form, so that only the harm differs) or against plain pictures with a caption
request ("plain", as the paper has it). Text: compliant against refusing assistant turns after the
same harmful prompts.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from guardbake.activations import Activations, Rows, Turns, rows_at
from guardbake.fit.care_public import public_subspace
from guardbake.fit.subspace import discriminative_subspace
from guardbake.recipe import CandidateSection
from guardbake.site import Site
from guardbake.spec import Branch, Edit, Modality

CARRIES_REQUEST = ("typographic", "image")


@dataclass(frozen=True, eq=False)
class Contrasts:
    """Rows at the FFN outputs that CARE edits.

    prompts: the fit split. compliant, refusing: turns forced after the same harmful prompts. plain:
    plain pictures with a caption request, none where no candidate asks for them.
    """

    prompts: Activations
    compliant: Turns
    refusing: Turns
    plain: Activations = field(default_factory=lambda: Activations([], {}, {}))


def care_edit(section: CandidateSection, layer: int, contrasts: Contrasts) -> Edit:
    """Strength 1 at the FFN output of `layer`: kind care, or project if there is one branch.

    A parallel fusion's fixed ratio is in the branches' strengths. Raises MalformedError if rows are
    missing at that site, too few, not finite, or do not span the rank.
    """
    site = Site(layer, "ffn_output")
    shares = {"visual": section.visual_share, "text": 1 - section.visual_share}
    branches = [_branch(section, modality, site, contrasts) for modality in section.branches]
    if len(branches) == 1:
        return Edit(site, "project", tuple(branches))
    if section.fusion == "parallel":
        branches = [
            Branch(b.modality, b.basis, b.centre, shares[b.modality], b.gains) for b in branches
        ]
    return Edit(site, "care", tuple(branches), fusion=section.fusion)


def _branch(
    section: CandidateSection, modality: Modality, site: Site, contrasts: Contrasts
) -> Branch:
    rows = visual_rows if modality == "visual" else text_rows
    malicious, benign = rows(section, site, contrasts)
    gains = None
    if section.numerics == "public":
        public = public_subspace(malicious, benign, section.rank)
        basis, centre, gains = public.basis, public.centre, public.gains.astype(np.float32)
    else:
        exact = discriminative_subspace(malicious, benign, section.rank, section.ridge)
        basis, centre = exact.basis, exact.centre
    return Branch(modality, basis.astype(np.float32), centre.astype(np.float32), 1.0, gains)


def visual_rows(section: CandidateSection, site: Site, contrasts: Contrasts) -> tuple[Rows, Rows]:
    """(malicious [N, d], benign [M, d]) over image tokens."""
    prompts = contrasts.prompts
    carries = prompts.where(lambda s: s.form in CARRIES_REQUEST)
    harmful = prompts.where(lambda s: s.label == "harmful")
    pictures = _pictures(section, prompts, site)
    if section.contrast == "typographic":
        return pictures[carries & harmful], pictures[carries & ~harmful]
    return pictures[carries & harmful], _pictures(section, contrasts.plain, site)


def text_rows(section: CandidateSection, site: Site, contrasts: Contrasts) -> tuple[Rows, Rows]:
    """(compliant [N, d], refusing [N, d]) over the tokens of the turn."""
    compliant, refusing = (
        rows_at(turns.attributed if section.attribution else turns.mean, site, "CARE, text")
        for turns in (contrasts.compliant, contrasts.refusing)
    )
    return compliant, refusing


def _pictures(section: CandidateSection, activations: Activations, site: Site) -> Rows:
    kind = activations.image_attributed if section.attribution else activations.image_mean
    return rows_at(kind, site, "CARE, visual")
