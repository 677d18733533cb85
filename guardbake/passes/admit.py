"""What a graph must be before anything is read from it, let alone changed.

Requires: nothing. Leaves: the graph as it was.
"""

from __future__ import annotations

from collections import Counter

import onnx_ir as ir

from guardbake.errors import MalformedError, UnsupportedError

# What onnxruntime 1.31 loads. A newer version may give an operator of the guard, or of the decoder
# around it, another meaning that nobody has looked at here.
MAX_IR, MAX_OPSET = 13, 26


def admit(model: ir.Model, where: str) -> None:
    """Raises UnsupportedError on a newer ONNX, MalformedError on a graph with names in doubt."""
    opset = model.opset_imports.get("", 0)
    for what, found, most in (("IR", model.ir_version, MAX_IR), ("opset", opset, MAX_OPSET)):
        if found > most:
            raise UnsupportedError(
                found=f"{what} version {found}",
                expected=f"{most} or earlier",
                where=where,
                remedy="export the model for an earlier ONNX, or take a newer guardbake",
            )
    for graph in (model.graph, *model.graph.subgraphs()):
        twice = [name for name, count in Counter(n.name for n in graph).items() if count > 1]
        named = [name for name in twice if name]
        if named:
            raise MalformedError(
                found=f"{named[0]!r:.120} as the name of two nodes",
                expected="a name for one node only",
                where=where,
                remedy="export the model again",
            )
