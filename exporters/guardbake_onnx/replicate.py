"""Trace few layers, get all of them: layers of one kind differ in their parameters alone.

Of each kind two layers are traced. The first of a kind may compute what all later ones share, a
mask or an angle; the second is a copy of every later one.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch

from guardbake.errors import UnsupportedError

from guardbake_onnx.parameters import mark, parameter_of
from guardbake_onnx.tidy import SCOPES, leaving_values, scopes_of

_DEPTHS = ("num_hidden_layers", "depth")


def template_layers(kinds: Sequence[str]) -> list[int]:
    """Which layers to trace of a stack with these kinds: the first two of each, in their order.

    >>> template_layers(["window", "window", "window", "full", "window", "full", "full"])
    [0, 1, 3, 5]
    """
    places = {kind: [n for n, other in enumerate(kinds) if other == kind] for kind in kinds}
    return sorted(n for found in places.values() for n in found[:2])


@contextlib.contextmanager
def only_layers(owner: torch.nn.Module, name: str, chosen: Sequence[int]) -> Iterator[None]:
    """Let the module list owner.<name> have these layers alone for the length of the block.

    owner.config says so, too: a model may count by its configuration. So do modules of the layers
    that know their layer's number, by which they find their cache.
    """
    stack: Any = owner.get_submodule(name)
    parent = owner.get_submodule(name.rpartition(".")[0])
    config: Any = owner.config
    before: dict[str, Any] = {key: getattr(config, key) for key in _DEPTHS if hasattr(config, key)}
    now: dict[str, Any] = dict.fromkeys(before, len(chosen))
    if (kinds := getattr(config, "layer_types", None)) is not None:
        before["layer_types"], now["layer_types"] = kinds, [kinds[n] for n in chosen]
    counting = [
        (place, number, module)
        for place, number in enumerate(chosen)
        for module in stack[number].modules()
        if hasattr(module, "layer_idx")
    ]
    parent.add_module(name.rpartition(".")[2], torch.nn.ModuleList(stack[n] for n in chosen))
    for key, value in now.items():
        setattr(config, key, value)
    for place, _, module in counting:
        module.layer_idx = place
    try:
        yield
    finally:
        for key, value in before.items():
            setattr(config, key, value)
        for _, number, module in counting:
            module.layer_idx = number
        parent.add_module(name.rpartition(".")[2], stack)


@dataclass
class _Layer:
    """One traced layer: its place in the trace and in the stack, its nodes, what flows through.

    hidden_in: what the layer before handed to it; None for the first layer.
    """

    place: int
    number: int
    nodes: list[ir.Node]
    hidden_in: ir.Value | None
    hidden_out: ir.Value


def replicate(graph: ir.Graph, root: str, kinds: Sequence[str]) -> None:
    """Make a trace of `template_layers(kinds)` a graph of all of them.

    requires: a simplified graph with scopes, the traced layers at root.0, root.1, ... (a path as
    traced). leaves: layers root.0 ... root.N-1 with their own parameters and their own inputs and
    outputs named <anything>.N.<anything>; the same nodes as a trace of the whole stack. Raises
    UnsupportedError unless exactly one value goes from layer to layer.
    """
    chosen = template_layers(kinds)
    layers = _layers(graph, root, chosen)
    second = {kinds[layer.number]: layer for layer in layers}
    rest = [use for use in layers[-1].hidden_out.uses() if use.node not in layers[-1].nodes]
    in_place = {layer.number: layer for layer in layers}
    previous, last = layers[0].hidden_out, layers[0].nodes[-1]
    for number, kind in enumerate(kinds):
        if number in in_place:
            layer = in_place[number]
            _feed(layer, previous)
            _renumber(layer, root)
            nodes, out = layer.nodes, layer.hidden_out
        else:
            nodes, out = _copy(graph, second[kind], root, number, previous)
            graph.insert_after(last, nodes)
        previous, last = out, nodes[-1]
    for use in rest:
        use.node.replace_input_with(use.idx, previous)
    for values in (graph.inputs, graph.outputs):
        ordered = _by_layer(list(values))
        values.clear()
        values.extend(ordered)


def _layers(graph: ir.Graph, root: str, chosen: Sequence[int]) -> list[_Layer]:
    """The traced layers. A layer hands on the one value in which the next one's role repeats."""
    inside = [
        [node for node in graph if f"{root}.{place}" in scopes_of(node)]
        for place in range(len(chosen))
    ]
    # the last layer shares nothing with a later one, so what leaves it tells the role
    leaving = [v for v in leaving_values(graph, f"{root}.{len(chosen) - 1}") if not _is_output(v)]
    if len(leaving) != 1:
        raise _unclear(f"{len(leaving)} values leaving it", f"{root}.{len(chosen) - 1}")
    role = _role(leaving[0], root)
    outs = []
    for place in range(len(chosen)):
        alike = [v for v in leaving_values(graph, f"{root}.{place}") if _role(v, root) == role]
        if len(alike) != 1:
            raise _unclear(f"{len(alike)} values that could be handed on", f"{root}.{place}")
        outs.append(alike[0])
    return [
        _Layer(place, number, inside[place], outs[place - 1] if place else None, outs[place])
        for place, number in enumerate(chosen)
    ]


def _role(value: ir.Value, root: str) -> tuple[object, ...]:
    """What a value is within its layer, the same for every layer."""
    node = value.producer()
    if node is None:
        return (None,)
    path = re.sub(rf"{re.escape(root)}\.\d+", root, ".".join(scopes_of(node)[-2:-1]))
    return node.op_type, path, str(value.shape), value.dtype, _is_output(value)


def _is_output(value: ir.Value) -> bool:
    return value.is_graph_output()


def _feed(layer: _Layer, hidden: ir.Value) -> None:
    if layer.hidden_in is None:
        return
    for node in layer.nodes:
        for index, value in enumerate(node.inputs):
            if value is layer.hidden_in:
                node.replace_input_with(index, hidden)
    layer.hidden_in = hidden


def _renumber(layer: _Layer, root: str) -> None:
    """Give a layer that was traced at one place the number it has in the stack."""
    if layer.place == layer.number:
        return
    for value in {v for node in layer.nodes for v in node.inputs if v is not None}:
        if not _own(value, root, layer.place):
            continue
        parameter = parameter_of(value)
        if parameter is None:
            value.name = _numbered(str(value.name), layer.place, layer.number)
            continue
        value.name = _moved(str(value.name), root, layer.place, layer.number)
        mark(value, parameter.named(_moved(parameter.name, root, layer.place, layer.number)))
    for output in (value for node in layer.nodes for value in node.outputs):
        if output.is_graph_output():
            output.name = _numbered(str(output.name), layer.place, layer.number)
    for node in layer.nodes:
        node.metadata_props[SCOPES] = _moved(
            node.metadata_props[SCOPES], root, layer.place, layer.number
        )
    layer.place = layer.number


def _copy(
    graph: ir.Graph, layer: _Layer, root: str, number: int, hidden: ir.Value
) -> tuple[list[ir.Node], ir.Value]:
    """The layer's nodes again, as layer `number`, fed with `hidden`; returns them and their out."""
    twins: dict[ir.Value | None, ir.Value | None] = {layer.hidden_in: hidden}
    outputs = set(graph.outputs)
    nodes = []
    for node in layer.nodes:
        for value in node.inputs:
            if value is not None and value not in twins:
                twins[value] = _twin_input(graph, value, root, layer.place, number)
        twin = ir.Node(
            node.domain,
            node.op_type,
            [twins.get(value) for value in node.inputs],
            attributes=list(node.attributes.values()),
            num_outputs=len(node.outputs),
            overload=node.overload,
            version=node.version,
        )
        scopes = node.metadata_props.get(SCOPES, "")
        twin.metadata_props[SCOPES] = _moved(scopes, root, layer.place, number)
        for old, new in zip(node.outputs, twin.outputs, strict=True):
            new.shape, new.type = old.shape, old.type
            twins[old] = new
            if old in outputs:
                new.name = _numbered(str(old.name), layer.place, number)
                graph.outputs.append(new)
        nodes.append(twin)
    out = twins[layer.hidden_out]
    assert out is not None
    return nodes, out


def _twin_input(graph: ir.Graph, value: ir.Value, root: str, place: int, number: int) -> ir.Value:
    """The layer's own input or parameter under the other number; what it shares, as it is."""
    if not _own(value, root, place):
        return value
    parameter = parameter_of(value)
    name = str(value.name)
    name = _moved(name, root, place, number) if parameter else _numbered(name, place, number)
    twin = ir.Value(name=name, shape=value.shape, type=value.type)
    if parameter is not None:
        mark(twin, parameter.named(_moved(parameter.name, root, place, number)))
    graph.inputs.append(twin)
    return twin


def _by_layer(values: list[ir.Value]) -> list[ir.Value]:
    """The same, those of layers in the order of the layers; parameters stay where they are."""
    numbers = {
        value: int(found[1])
        for value in values
        if parameter_of(value) is None and (found := re.search(r"\.(\d+)\.", str(value.name)))
    }
    ordered = iter(sorted(numbers, key=numbers.__getitem__))
    return [next(ordered) if value in numbers else value for value in values]


def _own(value: ir.Value, root: str, place: int) -> bool:
    """Whether a value from outside the layer's nodes belongs to this layer alone."""
    if not value.is_graph_input():
        return False
    if parameter_of(value) is not None:
        return str(value.name).startswith(f"{root}.{place}.")
    return re.search(rf"\.{place}\.", str(value.name)) is not None


def _moved(text: str, root: str, place: int, number: int) -> str:
    return re.sub(rf"({re.escape(root)})\.{place}(?!\d)", rf"\1.{number}", text)


def _numbered(name: str, place: int, number: int) -> str:
    return re.sub(rf"\.{place}\.", f".{number}.", name)


def _unclear(found: str, where: str) -> UnsupportedError:
    return UnsupportedError(
        found=found,
        expected="layers that hand one hidden state on",
        where=f"module {where} of the traced graph",
        remedy="export with another tool and use guardbake apply",
    )
