"""The rules of `locate` that go by names: of values, of nodes, of the modules they come from.

A rule gives the values that it takes for the site's FFN output, or says why it knows none.
"""

from __future__ import annotations

import ast
import re

import onnx_ir as ir

from guardbake.errors import MalformedError
from guardbake.site import Site

SCOPES = "pkg.torch.onnx.name_scopes"
_LAST = r"(?:down_proj|dense_4h_to_h|fc2|c_proj|w2)"
# The last projection of an FFN as others name it, value or node: optimum and onnx-community
# /model/layers.1/mlp/down_proj/MatMul, the onnxruntime-genai builder that and .../MatMul_Q4,
# mobius model/layers.1/mlp/down_proj/MatMul_node_30 and v_model.layers.1.mlp.down_proj.MatMul_30.
_KNOWN = (
    r"(?:^|[/.])(?:layers|h|blocks)[./]{layer}[/.](?:mlp|feed_forward|ffn)[/.](?:[\w.]+[/.])?"
    + _LAST
    + r"[/.](?:MatMul|Gemm|Add)[\w/]*"
)
_ANY = re.compile(r"[/.](?:mlp|feed_forward|ffn)[/.](?:[\w.]+[/.])?" + _LAST)
NORMS = ("RMSNormalization", "SimplifiedLayerNormalization")
_TOWERS = re.compile(r"vision|visual|audio")


def is_standard(node: ir.Node, *kinds: str) -> bool:
    """Whether the node is one of these operators of ONNX, and not another's of the same name."""
    return node.op_type in kinds and node.domain in ("", "ai.onnx")


def by_our_name(graph: ir.Graph, site: Site) -> list[ir.Value] | str:
    exact = [v for node in graph for v in node.outputs if v.name == site.onnx_value]
    return [_leaves_as(value) for value in exact] or f"no value {site.onnx_value}"


def by_known_name(graph: ir.Graph, site: Site) -> list[ir.Value] | str:
    pattern = re.compile(_KNOWN.format(layer=site.layer))
    hits = [
        value
        for node in graph
        for value in node.outputs[:1]
        if any(_matches(pattern, name) for name in (value.name, node.name))
    ]
    # A projection with a bias is two hits, product and sum: the exit is the one no other hit reads.
    exits = [v for v in hits if not any(o in hits for u in v.uses() for o in u.node.outputs)]
    return [_leaves_as(value) for value in exits] or f"no down_proj in layers.{site.layer}"


def _matches(pattern: re.Pattern[str], name: str | None) -> bool:
    return bool(name) and bool(pattern.search(str(name))) and not _TOWERS.search(str(name))


def _leaves_as(product: ir.Value) -> ir.Value:
    """What joins the residual: the product, or what a bias, the end of a Gemm and a norm behind
    the FFN make of it."""
    users = tuple(product.uses())
    if len(users) != 1:
        return product
    node, index = users[0].node, users[0].idx
    other = node.inputs[1 - index] if node.op_type == "Add" else None
    if other is not None and is_constant(other):
        return _leaves_as(node.outputs[0])
    producer = product.producer()
    flat = producer is not None and producer.op_type in ("Gemm", "Add")
    if node.op_type == "Reshape" and index == 0 and flat:  # Gemm knows matrices only
        return _leaves_as(node.outputs[0])
    if node.op_type == "Cast":  # to a norm that computes in more precision than the stream
        users = tuple(node.outputs[0].uses())
        node, index = (users[0].node, users[0].idx) if len(users) == 1 else (node, 1)
    return node.outputs[0] if node.op_type in NORMS and index == 0 else product


def is_constant(value: ir.Value) -> bool:
    """A number of the graph: an initialiser, or what a Constant node holds."""
    producer = value.producer()
    return value.is_initializer() or (producer is not None and producer.op_type == "Constant")


def by_scope(graph: ir.Graph, site: Site) -> list[ir.Value] | str:
    """What leaves the module `layers.<i>.mlp`, behind the norm that may follow it."""
    suffix = f"layers.{site.layer}.mlp"
    inside = {node for node in graph if _in_scope(node, suffix)}
    leaving = [
        v
        for node in graph
        if node in inside
        for v in node.outputs
        if any(u.node not in inside for u in v.uses())
    ]
    return [_leaves_as(value) for value in leaving] or f"no node in a scope {suffix}"


def _in_scope(node: ir.Node, suffix: str) -> bool:
    text = node.metadata_props.get(SCOPES, "")
    try:
        scopes = ast.literal_eval(text) if text else []
    except (ValueError, SyntaxError) as error:
        raise MalformedError(
            found=f"{SCOPES} = {text[:40]!r}",
            expected="a list of module names",
            where=f"node {node.name}",
            remedy="export the graph again",
        ) from error
    return any(
        (scope == suffix or scope.endswith(f".{suffix}")) and not _TOWERS.search(scope)
        for scope in scopes
    )


def near_misses(graph: ir.Graph) -> list[str]:
    """At most six values named after the last projection of some FFN."""
    names = {str(v.name) for node in graph for v in node.outputs if _ANY.search(str(v.name))}
    return sorted(names)[:6]
