"""Decoders that stand in the branches of an If: the merged graphs of older optimum exports.

Such a graph takes `use_cache_branch` and holds the whole decoder twice, for a call without and with
a cache. Each branch is a decoder of its own to the passes: `decoders` lends it the inputs of the
graph around it, and hands back what a pass added, new inputs and outputs included.

Requires: a graph whose logits come from one If, or an ordinary decoder, which is its own only one.
Leaves: the same graph; of a pass that fails, nothing is promised.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NoReturn

import onnx_ir as ir

from guardbake.errors import UnsupportedError

BRANCHES = ("then_branch", "else_branch")


def switch_of(model: ir.Model) -> ir.Node | None:
    """The If that the logits come from, if there is one."""
    logits = next((value for value in model.graph.outputs if value.name == "logits"), None)
    node = logits.producer() if logits is not None else None
    return node if node is not None and node.op_type == "If" and not node.domain else None


def decoders(model: ir.Model) -> Iterator[tuple[str, ir.Model]]:
    """(branch, decoder) for each decoder in the graph; an ordinary one is called "".

    A branch is a decoder only while it is being looked at: changes reach `model` at the next step.
    Raises UnsupportedError if the branches have other outputs than the If, also after a pass.
    """
    switch = switch_of(model)
    if switch is None:
        yield "", model
        return
    functions, notes = dict(model.functions), dict(model.metadata_props)
    added: list[list[ir.Value]] = []
    for name in BRANCHES:
        graph = switch.attributes[name].as_graph()
        count = _require_same_outputs(switch, graph)
        _lend(model.graph, graph)
        graph.opset_imports.update(model.opset_imports)
        view = ir.Model(
            graph,
            ir_version=model.ir_version,
            functions=list(functions.values()),
            metadata_props=dict(notes),
        )
        yield name, view
        _take_back(model.graph, graph)
        added.append(list(graph.outputs)[count:])
        model.functions.update(view.functions)
        model.opset_imports.update(graph.opset_imports)
        model.metadata_props.update(view.metadata_props)
    _expose(model.graph, switch, added)


def _require_same_outputs(switch: ir.Node, branch: ir.Graph) -> int:
    """How many outputs branch and If have; UnsupportedError unless they go by the same names."""
    inner, outer = ([str(v.name) for v in values] for values in (branch.outputs, switch.outputs))
    if inner != outer:
        strange = sorted(set(inner) ^ set(outer))
        _refuse(f"branch {branch.name} with other outputs than its If: {strange[:4]}")
    return len(inner)


def _lend(outer: ir.Graph, branch: ir.Graph) -> None:
    """Make the outer graph's inputs inputs of the branch."""
    loans = {v: ir.Value(name=v.name, type=v.type, shape=v.shape) for v in outer.inputs}
    for node in list(ir.traversal.RecursiveGraphIterator(branch)):
        for index, value in enumerate(node.inputs):
            if value is not None and value in loans:
                node.replace_input_with(index, loans[value])
    branch.inputs.extend(loans.values())


def _take_back(outer: ir.Graph, branch: ir.Graph) -> None:
    """Give every input of the branch back to the outer graph, new ones as new inputs."""
    known = {str(value.name): value for value in outer.inputs}
    for value in list(branch.inputs):
        name = str(value.name)
        if name not in known:
            known[name] = ir.Value(name=name, type=value.type, shape=value.shape)
            outer.inputs.append(known[name])
        for use in list(value.uses()):
            use.node.replace_input_with(use.idx, known[name])
    branch.inputs.clear()


def _expose(outer: ir.Graph, switch: ir.Node, added: Sequence[Sequence[ir.Value]]) -> None:
    """New outputs of the branches become outputs of the If, and of the graph."""
    names = [[str(value.name) for value in values] for values in added]
    if names[0] != names[1]:
        _refuse(f"outputs {names[0]} of one branch and {names[1]} of the other")
    count = len(switch.outputs)
    if names[0]:
        switch.resize_outputs(count + len(names[0]))
    for inner, value in zip(added[0], list(switch.outputs)[count:], strict=True):
        value.name, value.type, value.shape = inner.name, inner.type, inner.shape
        outer.outputs.append(value)


def require_twins(values: Sequence[ir.Value], where: str) -> None:
    """UnsupportedError unless both branches compute the site with the same weights and dtype.

    values: the site's value in each branch. Only then is one guard fitted for both of them.
    """
    first, *others = values
    for value in others:
        if value.dtype != first.dtype:
            _refuse(f"{where} in {first.dtype} and in {value.dtype}")
        if _weights(value) != _weights(first):
            _refuse(f"{where} computed with other weights in each branch")


def _weights(value: ir.Value) -> list[object]:
    """What the initialisers of the projection that gives the value hold, or where they lie."""
    node, found = value.producer(), []
    while node is not None:
        constants = [v for v in node.inputs if v is not None and v.const_value is not None]
        found += [_content(v.const_value) for v in constants]
        rest = [v for v in node.inputs if v is not None and v.const_value is None]
        node = rest[0].producer() if node.op_type in ("Add", "Reshape") and rest else None
    return found


def _content(tensor: ir.TensorProtocol | None) -> object:
    if isinstance(tensor, ir.ExternalTensor):
        return str(tensor.location), tensor.offset or 0, tensor.nbytes
    return None if tensor is None else tensor.tobytes()


def _refuse(found: str) -> NoReturn:
    raise UnsupportedError(
        found=found,
        expected="two branches that are the same decoder, without and with a cache",
        where="the If that gives the logits",
        remedy="guard the graphs that were merged, each by itself",
    )
