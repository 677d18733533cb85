"""Find a site's value in a decoder graph: exactly one match, or an error with the near misses.

Four rules are asked in order, and the first that knows the site decides: our own value name, the
names that other exporters give, the torch exporter's scopes, the residual stream. A rule that does
not know the site says why not. Wherever the stream can be read it also has to agree with a name: a
name can lie, and a guard at the wrong tensor does nothing and says nothing.

Requires: an ONNX graph of one decoder, guarded or not. Leaves: the graph as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal, NoReturn

import onnx_ir as ir

from guardbake.errors import SiteError
from guardbake.passes.locate_names import SCOPES, by_known_name, by_our_name, by_scope, near_misses
from guardbake.passes.locate_stream import Stream, read_stream
from guardbake.passes.stream import residual_sum
from guardbake.site import Site

__all__ = ["SCOPES", "Found", "How", "Miss", "locate"]

How = Literal["our name", "known name", "torch scope", "residual stream"]


@dataclass(frozen=True)
class Miss:
    """A rule that does not know the site. reason: what it looked for and what it met instead."""

    how: How
    reason: str

    def __str__(self) -> str:
        return f"{self.how}: {self.reason}"


@dataclass(frozen=True)
class Found:
    """A site in a graph: its value and the rule that found it.

    missed: the rules asked before. confirmed: whether the residual stream shows the same value.
    """

    site: Site
    value: ir.Value
    how: How
    missed: tuple[Miss, ...] = ()
    confirmed: bool = False


def locate(graph: ir.Graph, sites: Iterable[Site]) -> dict[Site, Found]:
    """One value per site. Raises SiteError if a site has none or several."""
    stream = read_stream(graph)
    return {site: _locate_one(graph, site, stream) for site in sites}


def _locate_one(graph: ir.Graph, site: Site, stream: Stream) -> Found:
    rules: tuple[tuple[How, Callable[[ir.Graph, Site], list[ir.Value] | str]], ...] = (
        ("our name", by_our_name),
        ("known name", by_known_name),
        ("torch scope", by_scope),
        ("residual stream", lambda _, site: _by_stream(stream, site)),
    )
    missed: list[Miss] = []
    for how, rule in rules:
        values = rule(graph, site)
        if isinstance(values, str):
            missed.append(Miss(how, values))
            continue
        if len(values) > 1:
            names = ", ".join(str(value.name) for value in values)
            _refuse(site, f"{len(values)} matches by {how}: {names}")
        confirmed = _confirm(site, values[0], how, stream)
        value = values[0]
        if site.boundary == "residual":
            value = residual_sum(site, value)
        return Found(site, value, how, tuple(missed), confirmed)
    near = ", ".join(near_misses(graph)) or "none"
    _refuse(site, f"no match; near misses: {near}; {'; '.join(map(str, missed))}")


def _by_stream(stream: Stream, site: Site) -> list[ir.Value] | str:
    if stream.reason:
        return stream.reason
    if site.layer >= len(stream.ffn_outputs):
        return f"{len(stream.ffn_outputs)} layers only"
    return [stream.ffn_outputs[site.layer]]


def _confirm(site: Site, value: ir.Value, how: How, stream: Stream) -> bool:
    """Whether the stream shows this value; SiteError if it shows another one."""
    if stream.reason or how == "residual stream":
        return not stream.reason
    shown = _by_stream(stream, site)
    if isinstance(shown, str):
        _refuse(site, f"{value.name} by {how}, but the residual stream has {shown}")
    if shown[0] is not value:
        _refuse(site, f"{value.name} by {how}, but {shown[0].name} by the residual stream")
    return True


def _refuse(site: Site, found: str) -> NoReturn:
    raise SiteError(
        found=found,
        expected="exactly one FFN output that meets the residual",
        where=f"{site} of the decoder graph",
        remedy="check that the guard belongs to this model and that the graph is its decoder",
    )
