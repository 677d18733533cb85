"""VLM-Guard's safety steering directions (arXiv 2502.10486) as `project` (remove) and `add` edits.

Fitted on the tensor that is edited, the FFN output. Which of the two helps is not assumed: plain
removal is what refusal-removal tools do, and the sign test decides.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from guardbake.activations import Activations
from guardbake.fit.subspace import safety_directions
from guardbake.site import Site
from guardbake.spec import Branch, Edit


def safety_direction_edit(
    anchors: Activations, layer: int, rank: int, kind: Literal["project", "add"], strength: float
) -> Edit:
    """One branch of the top `rank` singular vectors of paired differences, no centring as printed.

    anchors: text form; row order pairs the i-th harmful with the i-th harmless prompt.
    """
    site = Site(layer, "ffn_output")
    rows = anchors.last[site]
    text = anchors.where(lambda s: s.form == "text")
    harmful = anchors.where(lambda s: s.label == "harmful")
    found = safety_directions(rows[text & harmful], rows[text & ~harmful], rank)
    centre = np.zeros(rows.shape[1], dtype=np.float32)
    return Edit(site, kind, (Branch("text", found.basis.astype(np.float32), centre, strength),))
