"""CARE's dual-modal subspaces (arXiv 2603.27240), fitted on the tensor that is edited.

Visual: typographic harmful against typographic harmless prompts, mean over the image tokens.
Text: compliant against refusing assistant turns after the same harmful prompts.
"""

from __future__ import annotations

import numpy as np

from guardbake.activations import Activations, Rows
from guardbake.covariance import Ridge
from guardbake.fit.subspace import Subspace, discriminative_subspace
from guardbake.site import Site
from guardbake.spec import Branch, Edit, Modality


def care_edit(
    fitting: Activations,
    compliant: Rows,
    refusing: Rows,
    layer: int,
    rank: int,
    strength: float,
    ridge: Ridge,
) -> Edit:
    """Both branches at the FFN output of `layer`.

    fitting: holds typographic rows. compliant, refusing: [N, d] at the same site, answer tokens.
    """
    site = Site(layer, "ffn_output")
    drawn = fitting.where(lambda s: s.form == "typographic")
    harmful = fitting.where(lambda s: s.label == "harmful")
    pictures = fitting.image_mean[site]
    visual = discriminative_subspace(
        pictures[drawn & harmful], pictures[drawn & ~harmful], rank, ridge
    )
    text = discriminative_subspace(compliant, refusing, rank, ridge)
    return Edit(
        site, "care", (_branch("visual", visual, strength), _branch("text", text, strength))
    )


def _branch(modality: Modality, subspace: Subspace, strength: float) -> Branch:
    basis, centre = subspace.basis.astype(np.float32), subspace.centre.astype(np.float32)
    return Branch(modality, basis, centre, strength)
