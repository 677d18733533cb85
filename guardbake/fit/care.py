"""CARE's dual-modal subspaces (arXiv 2603.27240), fitted on the tensor that is edited.

Visual: pictures that carry a harmful request, against pictures that carry a harmless one (contrast
"typographic", same form, so that only the harm differs) or against plain pictures with a caption
request ("plain", as the paper has it). Text: compliant against refusing assistant turns after the
same harmful prompts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from guardbake.activations import Activations, Rows, rows_at
from guardbake.fit.care_public import public_subspace
from guardbake.fit.contrasts import Contrasts
from guardbake.fit.selection import (
    choose_rank,
    choose_ridge,
    largest_rank,
    trust,
    winsorised,
)
from guardbake.fit.subspace import discriminative_subspace
from guardbake.recipe import CandidateSection
from guardbake.site import Site
from guardbake.spec import Branch, Edit, EditKind, Modality

CARRIES_REQUEST = ("typographic", "image")


@dataclass(frozen=True, eq=False)
class CareFit:
    """edit: strength 1, kind care, or project if there is one branch. evidence[modality]: JSON
    values that say what was fitted and how far it can be trusted (see `fit.selection`)."""

    edit: Edit
    evidence: Mapping[str, Mapping[str, object]]


def fit_care(section: CandidateSection, layer: int, contrasts: Contrasts) -> CareFit:
    """At the FFN output of `layer`. A parallel fusion's fixed ratio is in the branches' strengths.

    Raises MalformedError if rows are missing at that site, too few, not finite, or do not span the
    rank.
    """
    site = Site(layer, "ffn_output")
    alone = len(section.branches) == 1
    shares = {"visual": section.visual_share, "text": 1 - section.visual_share}
    branches: list[Branch] = []
    evidence: dict[str, Mapping[str, object]] = {}
    for modality in section.branches:
        rows = visual_rows if modality == "visual" else text_rows
        share = shares[modality] if section.fusion == "parallel" else 1.0
        fit = _public if section.numerics == "public" else _exact
        branch, evidence[modality] = fit(section, modality, share, *rows(section, site, contrasts))
        branches.append(branch)
    kind: EditKind = "project" if alone else "care"
    return CareFit(Edit(site, kind, tuple(branches), fusion=section.fusion), evidence)


def _exact(
    section: CandidateSection, modality: Modality, share: float, malicious: Rows, benign: Rows
) -> tuple[Branch, dict[str, object]]:
    bad, good = winsorised(malicious, benign, section.winsorise)
    most = section.rank if section.rank != "held-out" else largest_rank(len(bad), bad.shape[1])
    ridge = section.ridge if section.ridge != "held-out" else choose_ridge(bad, good, most)
    rank = section.rank if section.rank != "held-out" else choose_rank(bad, good, most, ridge)
    found = discriminative_subspace(bad, good, rank, ridge)
    basis, centre = found.basis.astype(np.float32), found.centre.astype(np.float32)
    evidence = _counts(malicious, benign) | {"rank": rank, "ridge": ridge}
    evidence |= {"winsorised": section.winsorise}
    return Branch(modality, basis, centre, share), evidence | trust(bad, good, rank, ridge)


def _public(
    section: CandidateSection, modality: Modality, share: float, malicious: Rows, benign: Rows
) -> tuple[Branch, dict[str, object]]:
    assert section.rank != "held-out"  # the recipe's own check
    found = public_subspace(malicious, benign, section.rank)
    basis, centre, gains = (
        values.astype(np.float32) for values in (found.basis, found.centre, found.gains)
    )
    evidence = _counts(malicious, benign) | {"rank": section.rank, "ridge": "1e-6, absolute"}
    evidence["gains"] = [float(gains[0]), float(gains[-1])]
    return Branch(modality, basis, centre, share, gains), evidence


def _counts(malicious: Rows, benign: Rows) -> dict[str, object]:
    return {"malicious": len(malicious), "benign": len(benign)}


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
