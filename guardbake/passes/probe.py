"""Open a guarded graph for a check of its numbers: never for shipping.

Requires: a guarded decoder graph. `TapGuard` leaves the same graph with the tensors that reach each
guard node and leave it as outputs; `FreeThresholds` leaves its sensors' thresholds as inputs, so
that one session can be asked as it is, forced open and forced closed. A tap can break a runtime's
fusions, so logits and tokens are checked on the graph without taps.
"""

from __future__ import annotations

import onnx_ir as ir

from guardbake.passes.dtypes import dtype_of
from guardbake.passes.functions import DOMAIN
from guardbake.passes.insert import OPEN_OUT, SCORE_OUT, SITE_KEY
from guardbake.plugins import EDITED, REACHED

_THRESHOLDS = "/thresholds"


class TapGuard:
    """The pass. Outputs reached/<site> of every sensor and edit, edited/<site> of every edit; and
    scores and verdicts that the graph keeps inside."""

    def __repr__(self) -> str:
        return "TapGuard()"

    def __call__(self, model: ir.Model) -> tuple[str, ...]:
        """The names of the outputs it added."""
        names: list[str] = []
        for node in [node for node in model.graph if node.domain == DOMAIN]:
            inner = [value for value in node.outputs if not value.is_graph_output()]
            told = [v for v in inner if str(v.name).startswith((SCORE_OUT, OPEN_OUT))]
            model.graph.outputs.extend(told)
            names += [str(value.name) for value in told]
            site = node.metadata_props.get(SITE_KEY)
            if site is None:
                continue
            taps = {f"{REACHED}{site}": node.inputs[0]}
            if is_edit(node):
                taps[f"{EDITED}{site}"] = node.outputs[0]
            for name, value in taps.items():
                if value is not None and name not in names:
                    names.append(name)
                    _tap(model.graph, value, node, name)
        return tuple(names)


class FreeThresholds:
    """The pass. `FreeThresholds()(model)` returns the constants that became inputs, by name."""

    def __repr__(self) -> str:
        return "FreeThresholds()"

    def __call__(self, model: ir.Model) -> dict[str, ir.TensorProtocol]:
        freed = {}
        for name, value in list(model.graph.initializers.items()):
            tensor = value.const_value
            if name.startswith(f"{DOMAIN}/") and name.endswith(_THRESHOLDS) and tensor is not None:
                freed[name] = tensor
                del model.graph.initializers[name]
                value.const_value = None
                model.graph.inputs.append(value)
        return freed


def is_edit(node: ir.Node) -> bool:
    """Whether a guard node edits, by the name that `InsertGuard` gave it."""
    return str(node.name).endswith("/edit")


def _tap(graph: ir.Graph, value: ir.Value, beside: ir.Node, name: str) -> None:
    copy = ir.node("Identity", [value], name=name)
    copy.outputs[0].name = name
    copy.outputs[0].dtype = dtype_of(value) or ir.DataType.FLOAT
    copy.outputs[0].shape = value.shape
    graph.insert_after(beside, copy)
    graph.outputs.append(copy.outputs[0])
