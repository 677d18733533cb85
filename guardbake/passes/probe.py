"""Open a guarded graph for a check of its numbers: never for shipping.

Requires: a guarded decoder graph. Leaves: the same graph with the tensors that reach each guard
node and leave it as outputs, and with the sensors' thresholds as inputs, so that one session can be
asked as it is, forced open and forced closed.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from guardbake.passes.dtypes import dtype_of
from guardbake.passes.functions import DOMAIN
from guardbake.passes.insert import SITE_KEY

BEFORE, AFTER, READ = "before/", "after/", "read/"
_THRESHOLDS = "/thresholds"


@dataclass(frozen=True)
class Probe:
    """thresholds: the inputs that were constants, by name, and those constants."""

    thresholds: dict[str, ir.TensorProtocol]


class ProbeGuard:
    """The pass. Outputs before/<site> and after/<site> of each edit, read/<site> of each sensor."""

    def __repr__(self) -> str:
        return "ProbeGuard()"

    def __call__(self, model: ir.Model) -> Probe:
        seen: set[str] = set()
        for node in [node for node in model.graph if node.domain == DOMAIN]:
            site = node.metadata_props.get(SITE_KEY)
            if site is None:
                continue
            taps = {BEFORE: node.inputs[0], AFTER: node.outputs[0]}
            if not str(node.name).endswith("/edit"):
                taps = {READ: node.inputs[0]}
            for prefix, value in taps.items():
                if value is not None and f"{prefix}{site}" not in seen:
                    seen.add(f"{prefix}{site}")
                    _tap(model.graph, value, node, f"{prefix}{site}")
        return Probe(_free_thresholds(model.graph))


def _tap(graph: ir.Graph, value: ir.Value, beside: ir.Node, name: str) -> None:
    copy = ir.node("Identity", [value], name=name)
    copy.outputs[0].name = name
    copy.outputs[0].dtype = dtype_of(value) or ir.DataType.FLOAT
    graph.insert_after(beside, copy)
    graph.outputs.append(copy.outputs[0])


def _free_thresholds(graph: ir.Graph) -> dict[str, ir.TensorProtocol]:
    freed = {}
    for name, value in list(graph.initializers.items()):
        tensor = value.const_value
        if name.startswith(f"{DOMAIN}/") and name.endswith(_THRESHOLDS) and tensor is not None:
            freed[name] = tensor
            del graph.initializers[name]
            value.const_value = None
            graph.inputs.append(value)
    return freed
