"""What a lint rule reports, and the error that a report becomes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import onnx_ir as ir

from guardbake.errors import UnsupportedError

STANDARD: Final = ("", "ai.onnx")


@dataclass(frozen=True)
class Finding:
    """One fault: which node or function, what is wrong with it, what would be right, what to do."""

    node: str
    found: str
    expected: str
    remedy: str

    def __str__(self) -> str:
        return f"node {self.node!r}: {self.found}; expected {self.expected}; {self.remedy}"


Rule = Callable[[ir.Node], Finding | None]
"""Looks at one node; None if nothing is amiss with it."""


def given(node: ir.Node, index: int) -> ir.Value | None:
    """The node's input at `index`, None if it is left out."""
    return node.inputs[index] if len(node.inputs) > index else None


def is_standard(node: ir.Node, *op_types: str) -> bool:
    """Whether the node is one of these operators of the ONNX standard."""
    return node.domain in STANDARD and node.op_type in op_types


def require_clean(faults: Sequence[Finding], where: Path) -> None:
    """Raises UnsupportedError about the first fault, with the number of the others."""
    for fault in faults:
        others = f" (and {len(faults) - 1} more faults)" if len(faults) > 1 else ""
        raise UnsupportedError(
            found=f"node {fault.node!r}: {fault.found}{others}",
            expected=fault.expected,
            where=str(where),
            remedy=fault.remedy,
        )
