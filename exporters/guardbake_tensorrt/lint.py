"""What the parser would accept and get wrong, or refuse without naming a way out."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import onnx
import onnx_ir as ir

from guardbake.errors import UnsupportedError

from guardbake_tensorrt.lower import every_node

_STANDARD: Final = ("", "ai.onnx")
_PAST_KEY, _PAST_VALUE, _NONPAD = 4, 5, 6


@dataclass(frozen=True)
class Finding:
    """One fault: which node or function, what is wrong with it, what would be right, what to do."""

    node: str
    found: str
    expected: str
    remedy: str


def _given(node: ir.Node, index: int) -> bool:
    return len(node.inputs) > index and node.inputs[index] is not None


def _padded_attention(node: ir.Node) -> Finding | None:
    if node.op_type != "Attention" or node.domain not in _STANDARD or not _given(node, _NONPAD):
        return None
    return Finding(
        node.name or "",
        "Attention with nonpad_kv_seqlen, which the parser drops without a word",
        "Attention without it",
        "express the lengths as attn_mask, or as TRT_Attention with kv_lengths",
    )


def _cached_attention(node: ir.Node) -> Finding | None:
    if node.op_type != "Attention" or node.domain not in _STANDARD:
        return None
    presents = [value for value in node.outputs[1:3] if value.uses() or value.is_graph_output()]
    if not (_given(node, _PAST_KEY) or _given(node, _PAST_VALUE) or presents):
        return None
    return Finding(
        node.name or "",
        "Attention that owns its cache (past_key, past_value or present outputs)",
        "Attention on keys and values that a Concat joined before it",
        "export with the cache outside Attention",
    )


def _vendor_operator(node: ir.Node) -> Finding | None:
    remedies = {
        "GroupQueryAttention": "export with opset 23 `Attention` instead",
        "MatMulNBits": "export the unquantised model, or quantise with QuantizeLinear pairs",
    }
    if node.domain != "com.microsoft" or node.op_type not in remedies:
        return None
    return Finding(
        node.name or "",
        f"com.microsoft {node.op_type}, which only onnxruntime's own provider has",
        "operators of the ONNX standard",
        remedies[node.op_type],
    )


def _branch(node: ir.Node) -> Finding | None:
    if node.op_type != "If" or node.domain not in _STANDARD:
        return None
    return Finding(
        node.name or "",
        "If, whose condition is one element and cannot gate the rows of a batch",
        "Where",
        "write the choice as Where, per row",
    )


_RULES: Final[tuple[Callable[[ir.Node], Finding | None], ...]] = (
    _padded_attention,
    _cached_attention,
    _vendor_operator,
    _branch,
)


def _standard_names() -> frozenset[str]:
    return frozenset(schema.name for schema in onnx.defs.get_all_schemas())


def _shadowed_functions(model: ir.Model, built_in: Callable[[str], bool]) -> Iterator[Finding]:
    """A built-in importer wins over a function of its name, whatever the function's domain."""
    standard = _standard_names()
    for domain, name, _ in sorted(model.functions):
        if name in standard or name.startswith("TRT_") or built_in(name):
            yield Finding(
                f"{domain}::{name}",
                "a model-local function that the parser would replace by its own operator",
                "a function whose name no built-in operator has",
                "rename the function",
            )


def findings(
    model: ir.Model, built_in: Callable[[str], bool] = lambda _: False
) -> tuple[Finding, ...]:
    """Every fault of the graph, its subgraphs and its functions, in the graph's order.

    built_in: whether the parser has an importer for an operator name (its `supports_operator`);
    it knows names that are in no ONNX standard.
    """
    by_node = [f for node in every_node(model) for rule in _RULES if (f := rule(node)) is not None]
    return (*by_node, *_shadowed_functions(model, built_in))


def require_clean(faults: Collection[Finding], where: Path) -> None:
    """Raises UnsupportedError about the first fault, with the number of the others."""
    for fault in faults:
        others = f" (and {len(faults) - 1} more faults)" if len(faults) > 1 else ""
        raise UnsupportedError(
            found=f"node {fault.node!r}: {fault.found}{others}",
            expected=fault.expected,
            where=str(where),
            remedy=fault.remedy,
        )
