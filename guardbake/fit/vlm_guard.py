"""VLM-Guard's safety steering directions (arXiv 2502.10486) as edits of three kinds.

`project` removes what lies along them, `add` amplifies it, `replace` puts what the same prompt's
text alone has there in its place. Fitted on the tensor that is edited, the FFN output. Which of
them helps is not assumed: plain removal is what refusal-removal tools do, and the sign test
decides.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from guardbake.activations import Activations, rows_at
from guardbake.errors import MalformedError
from guardbake.fit.subspace import safety_directions
from guardbake.samples import Label, plainest
from guardbake.site import Site
from guardbake.spec import Branch, Edit

WHERE = "safety directions"


def safety_direction_edit(
    anchors: Activations, layer: int, rank: int, kind: Literal["project", "add", "replace"]
) -> Edit:
    """One branch of the top `rank` singular vectors of paired differences, strength 1.

    anchors: of the plainest form, the first harmful and the first harmless source are taken, and
    their prompts are paired by index (see models/prompts/anchors_*.txt). No centring, as printed.
    Raises MalformedError if a label has no such prompt, if fewer than `rank` pairs are found, or if
    their rows are missing at the FFN output of `layer` or not finite.
    """
    site = Site(layer, "ffn_output")
    rows = rows_at(anchors.last, site, WHERE)
    harmful, harmless = (_first_source(anchors, label) for label in ("harmful", "harmless"))
    paired = sorted(harmful.keys() & harmless.keys())
    found = safety_directions(
        rows[[harmful[i] for i in paired]], rows[[harmless[i] for i in paired]], rank
    )
    centre = np.zeros(rows.shape[1], dtype=np.float32)
    return Edit(site, kind, (Branch("text", found.basis.astype(np.float32), centre, 1.0),))


def _first_source(anchors: Activations, label: Label) -> dict[int, int]:
    """Row of each prompt index of the label's first source, in the plainest form."""
    words = plainest(anchors.samples)
    text = [
        (sample, row)
        for row, sample in enumerate(anchors.samples)
        if sample.form == words and sample.label == label
    ]
    if not text:
        raise MalformedError(
            found=f"no {label} prompt in the form {words!r}",
            expected="both labels, paired by index",
            where=WHERE,
            remedy="give the fit split sources of both labels",
        )
    return {sample.index: row for sample, row in text if sample.source == text[0][0].source}
