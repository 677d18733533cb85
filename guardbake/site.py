"""A site: one tensor of the decoder that a guard reads or edits, and its spelling elsewhere."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from guardbake.errors import MalformedError

Boundary = Literal["ffn_output", "residual"]

_SPELLING = re.compile(r"layers\.(0|[1-9][0-9]{0,5})\.(ffn_output|residual)")


@dataclass(frozen=True)
class Site:
    """One [B, T, d] tensor of decoder layer `layer` (counted from 0).

    boundary: "ffn_output" is what the FFN adds to the residual, before that add, and behind the
    norm where a model puts one after its FFN; "residual" is the hidden
    state after that add, the layer's output. A guard fitted at one boundary is weak at the other
    without any error, so the boundary is part of the name.
    """

    layer: int
    boundary: Boundary

    def __str__(self) -> str:
        return f"layers.{self.layer}.{self.boundary}"

    @property
    def depth(self) -> int:
        """Order in which data passes the sites: the FFN output, then the residual after it."""
        return 2 * self.layer + (1 if self.boundary == "residual" else 0)

    @property
    def onnx_value(self) -> str:
        """The name our exporter and the common ones give the FFN's last product in a graph: the
        site, unless a bias or a norm follows."""
        return f"/model/layers.{self.layer}/mlp/down_proj/MatMul/output_0"


def site_from_str(text: str) -> Site:
    """The site that `str(site)` spells; raises MalformedError on anything else.

    >>> site_from_str("layers.22.residual")
    Site(layer=22, boundary='residual')
    """
    match = _SPELLING.fullmatch(text)
    if match is None:
        raise MalformedError(
            found=f"{text!r}",
            expected="layers.<number>.ffn_output or layers.<number>.residual",
            where="the name of a site",
            remedy="correct the name",
        )
    boundary: Boundary = "residual" if match[2] == "residual" else "ffn_output"
    return Site(int(match[1]), boundary)
