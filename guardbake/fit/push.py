"""The gated push: add the mean difference of harmful and harmless prompts (METHODS 3 and 8).

Towards "harmful" is towards refusing: the direction in which an aligned model moves when it is
asked for something harmful. The push is fitted on the residual after a layer and added at that
layer's FFN output, which is the same edit.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from guardbake.activations import Activations, Rows, rows_at
from guardbake.fit.subspace import mean_difference
from guardbake.samples import plainest
from guardbake.site import Site
from guardbake.spec import Edit


def mean_difference_push(fitting: Activations, layer: int) -> Edit:
    """`steer` at the FFN output of `layer`, strength 1, from the plainest form of the fit split.

    Raises MalformedError if the residual after that layer was not captured, or is not finite, or if
    either label has fewer than two prompts in it.
    """
    rows = rows_at(fitting.last, Site(layer, "residual"), "mean-difference push")
    words = plainest(fitting.samples)
    text = fitting.where(lambda s: s.form == words)
    harmful = fitting.where(lambda s: s.label == "harmful")
    push = mean_difference(rows[text & harmful], rows[text & ~harmful])
    return Edit(Site(layer, "ffn_output"), "steer", (), push.astype(np.float32))


def refined_push(
    refined: Mapping[tuple[int, ...], Mapping[Site, Rows]], layers: tuple[int, ...], layer: int
) -> Edit:
    """`steer` at the FFN output of `layer`, strength 1: SPO-VLM's vector there (`vlm.preference`).

    Raises MalformedError if the vectors of `layers` were not refined.
    """
    site = Site(layer, "ffn_output")
    push = rows_at(refined.get(layers, {}), site, f"SPO-VLM's vectors of layers {layers}")
    return Edit(site, "steer", (), push)
