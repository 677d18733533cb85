"""What the parser would accept and get wrong, or refuse without naming a way out.

Rules by file: `lint_attention` and `lint_operators` look at one node or at a function's name,
`lint_types` follows dtypes, `lint_network` compares the parsed network with the graph. Two
complaints are the parser's own and are made errors in `network`: "Unused Input", and an input of
the graph that leads to no output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import onnx_ir as ir

from guardbake_tensorrt import lint_attention, lint_operators
from guardbake_tensorrt.finding import Finding, require_clean
from guardbake_tensorrt.lint_operators import (
    NATIVE,
    foreign_operators,
    native_functions,
    shadowed_functions,
)
from guardbake_tensorrt.lint_types import mixed_dtypes

__all__ = ["Finding", "findings", "findings_in_source", "require_clean"]

_RULES = (*lint_attention.RULES, *lint_operators.RULES)


def findings(
    model: ir.Model, built_in: Callable[[str], bool] = lambda _: False
) -> tuple[Finding, ...]:
    """Every fault of a lowered graph, its subgraphs and its functions, in the graph's order.

    built_in: whether the parser has an importer for an operator name (its `supports_operator`);
    it knows names that are in no ONNX standard.
    """
    nodes = list(_parsed(model))
    by_node = [f for node in nodes for rule in _RULES if (f := rule(node)) is not None]
    return (
        *by_node,
        *mixed_dtypes(nodes, model.opset_imports.get("", 0)),
        *foreign_operators(model, built_in),
        *shadowed_functions(model, built_in),
    )


def findings_in_source(model: ir.Model) -> tuple[Finding, ...]:
    """The faults of a graph that lowering would hide: see `native_functions`."""
    return tuple(native_functions(model))


def _parsed(model: ir.Model) -> Iterator[ir.Node]:
    """The nodes that the parser reads: not the bodies in whose place it has layers of its own."""
    yield from ir.traversal.RecursiveGraphIterator(model.graph)
    for key in sorted(model.functions):
        if key[1] not in NATIVE:
            yield from ir.traversal.RecursiveGraphIterator(model.functions[key])
