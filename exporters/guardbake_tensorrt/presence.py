"""Proof that the guard is in what is compiled, not only in the file.

In the graph: each guard node stands there once, a path leads from it to the output, and nothing
but the guard reads the value that an edit replaces. In the network that TensorRT made of it: each
guard node has layers, and a path leads from them to the output.

A layer carries its origin as `[ONNX Layer: NODE]`. For a node inside a model-local function that is
`[ONNX Layer: INNER | CALLER (Function) | OUTER CALLER (Function)]`, so a guard that is one function
call a site is found by the caller's name. What the builder fuses the layers into afterwards only a
GPU can show: the proof is about the network that is handed to the builder.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

import onnx_ir as ir

from guardbake.errors import SiteError
from guardbake.passes.functions import DOMAIN as GUARD_DOMAIN

from guardbake_tensorrt.dataflow import Dataflow, outputs

_ORIGIN = re.compile(r"\[ONNX Layer: (.*?)\](?=\x1e|\[|\s*$)")
_CALL = re.compile(r"(.*) \([^()]*\)")


def prove_in_graph(
    model: ir.Model, guard_nodes: Sequence[str], *, where: str, output: str = "logits"
) -> None:
    """Raises SiteError when a guard node is missing, doubled, without a path to `output`, or when
    another node reads the value it edits."""
    calls = {node for node in model.graph if node.domain == GUARD_DOMAIN}
    guard = calls | {node for node in model.graph if node.name in set(guard_nodes)}
    for name in guard_nodes:
        found = [node for node in model.graph if node.name == name]
        if len(found) != 1:
            raise _missing(f"{len(found)} nodes named {name!r}", "exactly one", where)
        if not _reaches(found[0].outputs, output):
            raise _missing(f"no path from {name!r} to {output}", "the guard to act on it", where)
        _refuse_bypass(found[0], guard, where)


def _reaches(values: Iterable[ir.Value], output: str) -> bool:
    seen: set[ir.Value] = set()
    stack = list(values)
    while stack:
        value = stack.pop()
        if value.is_graph_output() and value.name == output:
            return True
        if value not in seen:
            seen.add(value)
            stack += [after for use in value.uses() for after in use.node.outputs]
    return False


def _refuse_bypass(node: ir.Node, guard: set[ir.Node], where: str) -> None:
    """An edit is the guard node whose output ordinary nodes read in place of its first input."""
    edited = node.inputs[0] if node.inputs else None
    replaced = any(use.node not in guard for value in node.outputs for use in value.uses())
    if edited is None or not replaced:
        return
    for use in edited.uses():
        if use.node not in guard:
            raise _missing(
                f"{use.node.op_type} {use.node.name!r} reading {edited.name!r} past {node.name!r}",
                "only the guard to read the value it edits",
                where,
            )


def prove_in_network(
    network: Any, guard_nodes: Sequence[str], *, where: str, output: str = "logits"
) -> dict[str, tuple[str, ...]]:
    """The names of the layers that each guard node became, by guard node, in network order.

    Raises SiteError when a guard node became no layer, or none from which a path of tensors leads
    to the network output `output`.
    """
    dataflow = Dataflow(network)
    known = [(layer, origins(layer.metadata)) for layer in dataflow.layers]
    found: dict[str, tuple[str, ...]] = {}
    for guard_node in guard_nodes:
        own = [layer for layer, names in known if guard_node in names]
        if not own:
            raise _missing(f"no layer of {guard_node!r}", "at least one in the network", where)
        if output not in dataflow.reached(name for layer in own for name in outputs(layer)):
            raise _missing(f"no path from the layers of {guard_node!r} to {output}", "one", where)
        found[guard_node] = tuple(str(layer.name) for layer in own)
    return found


def origins(metadata: str) -> frozenset[str]:
    """The ONNX node names in a layer's metadata, callers of functions included.

    >>> sorted(origins("[ONNX Layer: MatMul_3 | guardbake/layers.2/edit (GuardbakeEdit)]"))
    ['MatMul_3', 'guardbake/layers.2/edit']
    """
    names = set()
    for entry in _ORIGIN.findall(metadata):
        inner, *callers = entry.split(" | ")
        names.add(inner)
        names.update(match[1] for caller in callers if (match := _CALL.fullmatch(caller)))
    return frozenset(names)


def _missing(found: str, expected: str, where: str) -> SiteError:
    return SiteError(
        found=found,
        expected=expected,
        where=where,
        remedy="do not ship this engine: insert the guard again into the unguarded export",
    )
