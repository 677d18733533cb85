"""Operators that the parser refuses without naming a way out, or takes for something else.

Tried one by one with TensorRT-RTX 1.7.1. A node's domain means nothing to its parser: `acme::Relu`
without a body is compiled as ReLU, and so is one whose model-local function computes another thing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

import onnx
import onnx_ir as ir

from guardbake_tensorrt.finding import STANDARD, Finding, Rule, is_standard

VENDOR: Final = "com.microsoft"
# Their importers compute what onnxruntime's documentation says; found by looking at the layers that
# each became. All others are "supported" by plugins that only onnxruntime's own provider loads, or
# not at all.
_VENDOR_ACCEPTED: Final = frozenset({
    "DequantizeLinear", "Gelu", "MultiHeadAttention", "QuantizeLinear", "RotaryEmbedding",
    "SimplifiedLayerNormalization", "SkipSimplifiedLayerNormalization",
})  # fmt: skip
_VENDOR_REMEDY: Final = {
    "GroupQueryAttention": "export with opset 23 `Attention` instead",
    "MatMulNBits": "export the unquantised model, or quantise with QuantizeLinear pairs",
}
NATIVE: Final = frozenset({"TRT_Attention", "TRT_KVCacheUpdate"})
"""Functions that the lowering writes so that onnxruntime runs what TensorRT has built in."""


def _vendor_operator(node: ir.Node) -> Finding | None:
    if node.domain != VENDOR or node.op_type in _VENDOR_ACCEPTED:
        return None
    return Finding(
        node.name or "",
        f"{VENDOR} {node.op_type}, which only onnxruntime's own provider has",
        "operators of the ONNX standard",
        _VENDOR_REMEDY.get(node.op_type, "export without onnxruntime's fusions"),
    )


def _reducing_scatter(node: ir.Node) -> Finding | None:
    reduction = node.attributes.get("reduction")
    if not is_standard(node, "ScatterND", "ScatterElements") or reduction is None:
        return None
    if reduction.as_string() == "none":
        return None
    return Finding(
        node.name or "",
        f"{node.op_type} with reduction {reduction.as_string()!r}",
        'reduction "none"',
        "gather the old values, reduce them with the updates, and scatter the result",
    )


def _counting(node: ir.Node) -> Finding | None:
    if not is_standard(node, "NonZero"):
        return None
    return Finding(
        node.name or "",
        "NonZero, whose number of results is known only when it has run",
        "operators whose sizes follow from the sizes of their inputs",
        "write the choice as Where, or the positions as CumSum of the mask",
    )


def _reduced_bool(node: ir.Node) -> Finding | None:
    if not is_standard(node, "ReduceMax", "ReduceMin"):
        return None
    if not node.inputs or node.inputs[0] is None or node.inputs[0].dtype != ir.DataType.BOOL:
        return None
    return Finding(
        node.name or "",
        f"{node.op_type} of bool",
        f"{node.op_type} of numbers",
        "put a Cast to INT64 before it and a Greater than 0 behind it",
    )


def _branch(node: ir.Node) -> Finding | None:
    if not is_standard(node, "If"):
        return None
    return Finding(
        node.name or "",
        "If, whose condition is one element and cannot gate the rows of a batch",
        "Where",
        "write the choice as Where, per row",
    )


def _double(node: ir.Node) -> Finding | None:
    wide = [v for v in (*node.inputs, *node.outputs) if v and v.dtype == ir.DataType.DOUBLE]
    if all(value.const_value is not None for value in wide):
        return None
    return Finding(
        node.name or "",
        f"{node.op_type} in DOUBLE, which the parser makes FLOAT without a word",
        "FLOAT, FLOAT16 or BFLOAT16",
        "put a Cast where the double begins, or export in float32",
    )


RULES: Final[tuple[Rule, ...]] = (
    _vendor_operator, _reducing_scatter, _counting, _reduced_bool, _branch, _double,
)  # fmt: skip


def shadowed_functions(model: ir.Model, built_in: Callable[[str], bool]) -> Iterator[Finding]:
    """A built-in importer wins over a function of its name, whatever the function's domain."""
    standard = _standard_names()
    for domain, name, _ in sorted(model.functions):
        if name in NATIVE:
            continue
        if name in standard or name.startswith("TRT_") or built_in(name):
            yield Finding(
                f"{domain}::{name}",
                "a model-local function that the parser would replace by its own operator",
                "a function whose name no built-in operator has",
                "rename the function",
            )


def native_functions(model: ir.Model) -> Iterator[Finding]:
    """In a graph that is still to be lowered nobody vouches for the body of a `TRT_*` function."""
    for domain, name, _ in sorted(model.functions):
        if name in NATIVE:
            yield Finding(
                f"{domain}::{name}",
                "a model-local function that the parser would replace by TensorRT's own layer",
                "no function of that name before guardbake has lowered the graph",
                "rename the function",
            )


def foreign_operators(model: ir.Model, built_in: Callable[[str], bool]) -> Iterator[Finding]:
    """Nodes of other domains that have no body: unknown, or taken for the standard's operator."""
    standard = _standard_names()
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        if node.domain in (*STANDARD, VENDOR) or node.op_identifier() in model.functions:
            continue
        taken = node.op_type in standard
        if not taken and (built_in(node.op_type) or node.op_type.startswith("TRT_")):
            continue
        what = "takes for the standard's operator of that name" if taken else "has no importer for"
        yield Finding(
            node.name or "",
            f"{node.domain}::{node.op_type} without a body, which the parser {what}",
            "an operator of the standard, or a model-local function of another name",
            "give the operator a body as a model-local function, or load its plugin",
        )


def _standard_names() -> frozenset[str]:
    return frozenset(schema.name for schema in onnx.defs.get_all_schemas())
