"""Find a site's value in a decoder graph: exactly one match, or an error with the near misses.

Requires: an ONNX graph of one decoder, guarded or not. Leaves: the graph as it was.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, NoReturn

import onnx_ir as ir

from guardbake.errors import MalformedError, SiteError
from guardbake.passes.stream import residual_sum
from guardbake.site import Site

How = Literal["our name", "known name", "torch scope"]
SCOPES = "pkg.torch.onnx.name_scopes"
# Output values of the last projection of an FFN as optimum, the onnxruntime-genai builder and
# mobius name them.
_KNOWN = (
    r"(?:^|/)layers\.{layer}/(?:mlp|feed_forward|ffn)/(?:[\w.]+/)?(?:down_proj|fc2|c_proj|w2)/"
    r"(?:MatMul|Gemm|Add)[\w/]*"
)


@dataclass(frozen=True)
class Found:
    """A site in a graph: its value and the rule that found it."""

    site: Site
    value: ir.Value
    how: How


def locate(graph: ir.Graph, sites: Iterable[Site]) -> dict[Site, Found]:
    """One value per site. Raises SiteError if a site has none or several."""
    return {site: _locate_one(graph, site) for site in sites}


def _locate_one(graph: ir.Graph, site: Site) -> Found:
    rules: tuple[tuple[How, list[ir.Value]], ...] = (
        ("our name", _by_our_name(graph, site)),
        ("known name", _by_known_name(graph, site)),
        ("torch scope", _by_scope(graph, site)),
    )
    for how, values in rules:
        if len(values) > 1:
            names = ", ".join(str(value.name) for value in values)
            _refuse(site, f"{len(values)} matches by {how}: {names}")
        if values:
            value = values[0]
            if site.boundary == "residual":
                value = residual_sum(site, value)
            return Found(site, value, how)
    near = sorted(
        str(value.name)
        for node in graph
        for value in node.outputs
        if value.name and "mlp" in value.name and "down_proj" in value.name
    )
    _refuse(site, f"no match; near misses: {', '.join(near[:6]) or 'none'}")


def _refuse(site: Site, found: str) -> NoReturn:
    raise SiteError(
        found=found,
        expected="exactly one FFN output that meets the residual",
        where=f"{site} of the decoder graph",
        remedy="check that the guard belongs to this model and that the graph is its decoder",
    )


def _by_our_name(graph: ir.Graph, site: Site) -> list[ir.Value]:
    exact = [v for node in graph for v in node.outputs if v.name == site.onnx_value]
    return [_past_bias(value) for value in exact]


def _past_bias(product: ir.Value) -> ir.Value:
    """The projection's output: the product itself, or its sum with a bias where it has one."""
    users = tuple(product.uses())
    if len(users) == 1 and users[0].node.op_type == "Add":
        node = users[0].node
        other = node.inputs[1 - users[0].idx]
        if other is not None and other.is_initializer():
            return node.outputs[0]
    return product


def _by_known_name(graph: ir.Graph, site: Site) -> list[ir.Value]:
    pattern = re.compile(_KNOWN.format(layer=site.layer))
    hits = [v for node in graph for v in node.outputs if v.name and pattern.search(v.name)]
    # A projection with a bias is two hits, product and sum: the exit is the one no other hit reads.
    return [v for v in hits if not any(o in hits for u in v.uses() for o in u.node.outputs)]


def _by_scope(graph: ir.Graph, site: Site) -> list[ir.Value]:
    suffix = f"layers.{site.layer}.mlp"
    inside = [node for node in graph if _in_scope(node, suffix)]
    return [
        v for node in inside for v in node.outputs if any(u.node not in inside for u in v.uses())
    ]


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
        (scope == suffix or scope.endswith(f".{suffix}")) and "vision" not in scope
        for scope in scopes
    )
