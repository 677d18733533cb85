"""Attention and its cache: what TensorRT's importers drop, refuse or cannot compile.

Each was planted and tried with TensorRT-RTX 1.7.1; `nonpad_kv_seqlen` alone is dropped in silence,
the others are refused by the parser or, later and in other words, by the builder.
"""

from __future__ import annotations

from typing import Final

import onnx_ir as ir

from guardbake_tensorrt.finding import Finding, Rule, given, is_standard

_MASK, _PAST_KEY, _PAST_VALUE, _NONPAD = 3, 4, 5, 6
# Every other dtype has no fused attention kernel and must be allowed to run as plain products.
_FUSED: Final = frozenset({ir.DataType.FLOAT16, ir.DataType.BFLOAT16})
_CACHE_RANK: Final = 4


def _padded(node: ir.Node) -> Finding | None:
    if not is_standard(node, "Attention") or given(node, _NONPAD) is None:
        return None
    return Finding(
        node.name or "",
        "Attention with nonpad_kv_seqlen, which the parser drops without a word",
        "Attention without it",
        "express the lengths as attn_mask, or as TRT_Attention with kv_lengths",
    )


def _cached(node: ir.Node) -> Finding | None:
    if not is_standard(node, "Attention"):
        return None
    more = [value for value in node.outputs[1:] if value.uses() or value.is_graph_output()]
    if given(node, _PAST_KEY) is None and given(node, _PAST_VALUE) is None and not more:
        return None
    return Finding(
        node.name or "",
        "Attention that owns its cache (past_key, past_value or more than one output)",
        "Attention of one output on keys and values that a Concat joined before it",
        "export with the cache outside Attention",
    )


def _capped(node: ir.Node) -> Finding | None:
    if not is_standard(node, "Attention") or _number(node, "softcap") == 0:
        return None
    return Finding(
        node.name or "",
        f"Attention with softcap {_number(node, 'softcap'):g}, which has no TensorRT layer",
        "Attention without softcap",
        "write the attention as MatMul, Tanh, Softmax and MatMul",
    )


def _masked_twice(node: ir.Node) -> Finding | None:
    masked = given(node, _MASK) is not None and _number(node, "is_causal") == 1
    if not is_standard(node, "Attention") or not masked:
        return None
    return Finding(
        node.name or "",
        "Attention with attn_mask and is_causal together",
        "one of the two",
        "write the causal part into attn_mask",
    )


def _precise(node: ir.Node) -> Finding | None:
    if not is_standard(node, "Attention") or "softmax_precision" not in node.attributes:
        return None
    return Finding(
        node.name or "",
        "Attention with softmax_precision",
        "Attention without it",
        "remove the attribute; cast query, key and value where the softmax must be exact",
    )


def _mask_dtype(node: ir.Node) -> Finding | None:
    query, mask = given(node, 0), given(node, _MASK)
    if not is_standard(node, "Attention") or query is None or mask is None:
        return None
    if mask.dtype in (None, ir.DataType.BOOL, query.dtype) or query.dtype is None:
        return None
    return Finding(
        node.name or "",
        f"Attention with a mask of {mask.dtype} on a query of {query.dtype}",
        "a mask of the query's dtype, or bool",
        "put a Cast before the mask",
    )


def _unmarked(node: ir.Node) -> Finding | None:
    if not (is_standard(node, "Attention") or node.op_type == "TRT_Attention"):
        return None
    query = given(node, 0)
    if (query is not None and query.dtype in _FUSED) or _number(node, "TRT_decomposable") == 1:
        return None
    kind = "unknown dtype" if query is None or query.dtype is None else str(query.dtype)
    return Finding(
        node.name or "",
        f"Attention in {kind} that may not be decomposed, for which there is no kernel",
        "FLOAT16 or BFLOAT16, or the attribute TRT_decomposable=1",
        "add the attribute, as guardbake's lowering does",
    )


def _scattered_cache(node: ir.Node) -> Finding | None:
    if not is_standard(node, "TensorScatter"):
        return None
    cache, mode = given(node, 0), node.attributes.get("mode")
    shape = None if cache is None else cache.shape
    if mode is not None and mode.as_string() != "linear":
        found = f"TensorScatter of mode {mode.as_string()!r}"
    elif shape is not None and len(shape) != _CACHE_RANK:
        found = f"TensorScatter into a cache of {len(shape)} dimensions"
    elif cache is not None and cache.producer() is not None:
        found = f"TensorScatter into {cache.name!r}, which is computed in the graph"
    else:
        return None
    return Finding(
        node.name or "",
        found,
        "TensorScatter, linear, into a 4-D cache that is an input of the graph",
        "keep the cache outside the graph and scatter into its input, [batch, heads, past, head]",
    )


def _number(node: ir.Node, name: str) -> float:
    """The node's numeric attribute `name`, 0 if it has none (the standard's default for all)."""
    attribute = node.attributes.get(name)
    return 0.0 if attribute is None or attribute.is_ref() else float(attribute.value)


RULES: Final[tuple[Rule, ...]] = (
    _padded, _cached, _capped, _masked_twice, _precise, _mask_dtype, _unmarked, _scattered_cache,
)  # fmt: skip
