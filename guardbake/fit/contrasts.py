"""What candidates are fitted on, all of it from the fit split; what none asks for is left out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from guardbake.activations import Activations, Rows, Turns
from guardbake.site import Site


@dataclass(frozen=True, eq=False)
class Contrasts:
    """Rows at the tensors that candidates edit.

    prompts: the fit split. compliant, refusing: turns forced after the same harmful prompts. plain:
    plain pictures with a caption request. ablated[site] [N, d]: what the tokens that ASTRA picks do
    to it, one row a harmful picture; benign[site] [M, d]: the model's own answers to harmless ones.
    refined[layers][site] [d]: SPO-VLM's vectors of all these layers together.
    """

    prompts: Activations
    compliant: Turns
    refusing: Turns
    plain: Activations = field(default_factory=lambda: Activations([], {}, {}))
    ablated: Mapping[Site, Rows] = field(default_factory=dict)
    benign: Mapping[Site, Rows] = field(default_factory=dict)
    refined: Mapping[tuple[int, ...], Mapping[Site, Rows]] = field(default_factory=dict)
