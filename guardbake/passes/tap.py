"""Expose guarded FFN outputs as graph outputs, for a check and never for shipping.

Requires: a guarded decoder graph. Leaves: one more output a guarded site, `edited/<site>`. A tap
can break a runtime's fusions, so logits and tokens are checked on the graph without taps.
"""

from __future__ import annotations

import onnx_ir as ir

from guardbake.passes.functions import DOMAIN
from guardbake.passes.insert import SITE_KEY


class TapEdits:
    """The pass. `TapEdits()(model)` returns the names of the outputs it added."""

    def __repr__(self) -> str:
        return "TapEdits()"

    def __call__(self, model: ir.Model) -> tuple[str, ...]:
        names = []
        for node in list(model.graph):
            if node.domain == DOMAIN and str(node.name).endswith("/edit"):
                name = f"edited/{node.metadata_props[SITE_KEY]}"
                edited = node.outputs[0]
                copy = ir.node("Identity", [edited], name=name)
                copy.outputs[0].name = name
                copy.outputs[0].type, copy.outputs[0].shape = edited.type, edited.shape
                model.graph.insert_after(node, copy)
                model.graph.outputs.append(copy.outputs[0])
                names.append(name)
        return tuple(names)
