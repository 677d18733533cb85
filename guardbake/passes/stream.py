"""The residual stream: the one way from a decoder's input to its logits, and where a site joins it.

A value that only *reaches* the logits may reach them times nothing, while a copy of it goes another
way. So it is proved that there is no other way: the site's value is added to the stream at once,
the stream that it is added to is the one it was computed from, and past that sum nothing but the
sum leads on. Sizes are no data: a path ends at `Shape` and `Size`. Operators are known by name and
domain: a function in the file may have any name (and `load_graph` refuses the standard's domain).

Requires: a decoder graph. Leaves: the graph as it was.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from typing import NoReturn, TypeAlias

import onnx_ir as ir

from guardbake.errors import SiteError
from guardbake.passes.functions import DOMAIN
from guardbake.passes.locate_names import is_standard
from guardbake.passes.locate_stream import (
    EMBEDS,
    IDS,
    NO_DATA,
    fuses_norm,
    not_a_sum,
    number_of,
    sum_of,
    token_values,
)
from guardbake.site import Site

Use: TypeAlias = tuple[ir.Node, int]
"""A node, and which of its inputs."""

_CACHE = re.compile(r"present\.(\d{1,6})\.")


def residual_sum(site: Site, value: ir.Value) -> ir.Value:
    """The hidden state after the residual add that reads the FFN output `value`, edited or not.

    Raises SiteError if anything else but the guard reads it, if its reader is no such add, or if
    the norm that the add is fused into does not give the sum out. A cast may stand before the add.
    """
    node = _residual_add(site, value)[0]
    total = sum_of(node)
    if total is None:
        _refuse(site, f"the FFN output feeds {node.op_type} {node.name}, which keeps the sum")
    return total


def _residual_add(site: Site, value: ir.Value) -> tuple[ir.Node, ir.Value]:
    """The add, and its operand: `value`, edited or not, or a cast of it."""
    guard = [use.node for use in value.uses() if use.node.domain == DOMAIN]
    values = [value, *(node.outputs[0] for node in guard)]
    users = [(use.node, v) for v in values for use in v.uses() if use.node.domain != DOMAIN]
    if len(users) == 1 and is_standard(users[0][0], "Cast"):
        cast = users[0][0].outputs[0]
        users = [(use.node, cast) for use in cast.uses()]
    if len(users) != 1:
        _refuse(site, f"{len(users)} readers of the FFN output {value.name}")
    if reason := not_a_sum(users[0][0]):
        _refuse(site, f"the FFN output feeds {reason}")
    return users[0]


def require_only_way(
    graph: ir.Graph,
    site: Site,
    width: int,
    product: ir.Value,
    edited: ir.Value | None = None,
    told: Collection[Use] = (),
) -> None:
    """Raises SiteError unless the data that goes past `site`'s layer goes through its residual sum.

    width: of the stream, as the guard has it. product: the FFN output as computed; edited: what
    enters the sum in its place, if anything does. told: uses that carry the guard's decision and no
    data.
    """
    joined = product if edited is None else edited
    node, added = _residual_add(site, joined)
    stream = next((v for v in node.inputs[:2] if v is not added), None)
    sources = token_values(graph, width)
    if stream is None or not sources:
        _refuse(site, f"no stream from {EMBEDS} or {IDS} to add the FFN output to")
    walk = _Walk(graph, {*told, *_one_token(graph)})
    around = walk.reached([s for s in sources if s is not stream], *_with_its_norm(stream))
    if product in around or product is stream:
        _refuse(site, f"{product.name} computed from another value than {stream.name}, its stream")
    after, past = walk.reached(node.outputs), walk.reached(sources, *node.outputs)
    if not any(output.name == "logits" and output in after for output in graph.outputs):
        _refuse(site, f"no path from {joined.name} to logits")
    for output in graph.outputs:
        if output in past and _lies_behind(output, site):
            _refuse(site, f"a path to {output.name} round {node.op_type} {node.name}")


def _one_token(graph: ir.Graph) -> list[Use]:
    """Uses of the ids of tokens, which come in by their embeddings, to find one among them, such
    as an image's. To find several apart could be to read them all."""
    inputs = {str(value.name): value for value in graph.inputs}
    found: dict[int, list[Use]] = {}
    for use in inputs[IDS].uses() if {IDS, EMBEDS} <= inputs.keys() else ():
        other = use.node.inputs[1 - use.idx] if is_standard(use.node, "Equal") else None
        token = number_of(other)
        if token is not None:
            found.setdefault(token, []).append((use.node, use.idx))
    return next(iter(found.values())) if len(found) == 1 else []


def _lies_behind(output: ir.Value, site: Site) -> bool:
    """Whether this graph output is computed after the site's layer: logits, and later caches."""
    cache = _CACHE.match(output.name or "")
    return output.name == "logits" if cache is None else int(cache[1]) > site.layer


class _Walk:
    """Which values data reaches. A node with subgraphs reads whatever these read from outside."""

    def __init__(self, graph: ir.Graph, told: Collection[Use]) -> None:
        self.told = told
        self.outer = {inner: node for node in graph for inner in _subgraphs(node)}

    def reached(self, sources: Collection[ir.Value], *closed: ir.Value) -> set[ir.Value]:
        """All values computed from `sources`, these included, without passing `closed` ones."""
        seen: set[ir.Value] = set(closed)
        stack = [value for value in sources if value not in seen]
        while stack:
            value = stack.pop()
            if value not in seen:
                seen.add(value)
                stack += self._computed_from(value)
        return seen.difference(closed)

    def _computed_from(self, value: ir.Value) -> Iterator[ir.Value]:
        for use in value.uses():
            if use not in self.told and not is_standard(use.node, *NO_DATA):
                inside = use.node.graph
                node = use.node if inside is None else self.outer.get(inside, use.node)
                yield from node.outputs


def _subgraphs(node: ir.Node) -> Iterator[ir.Graph]:
    """The graphs inside a node's attributes, and those inside them."""
    for attribute in node.attributes.values():
        held = attribute.value if isinstance(attribute, ir.Attr) else None
        for graph in held if isinstance(held, list | tuple) else [held]:
            if isinstance(graph, ir.Graph):
                yield graph
                yield from graph.subgraphs()


def _with_its_norm(stream: ir.Value) -> list[ir.Value]:
    """The stream, and the norm of it that the same node gives if add and norm are fused."""
    node = stream.producer()
    return list(node.outputs) if node is not None and fuses_norm(node) else [stream]


def _refuse(site: Site, found: str) -> NoReturn:
    raise SiteError(
        found=found,
        expected="an FFN output that is added to the residual stream, and no way round that sum",
        where=f"{site} of the decoder graph",
        remedy="check that the guard belongs to this model and that the graph is its decoder",
    )
