"""Mark which embeddings stand for image features: one more column behind the last.

A loop that merges image features into the token embeddings itself, and hands the decoder the result
alone, hands on with them what the graphs that made them say. Requires: a graph with one of the
outputs `inputs_embeds` (of token ids: 0 in the new column) and `image_features` (1), of known rank.
Leaves: that output, one wider. The decoder behind them takes the column off (`passes.carry`).
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from guardbake.errors import SiteError

MARKS = {"inputs_embeds": 0, "image_features": 1}


class MarkEmbeddings:
    """The pass. `MarkEmbeddings()(model)` changes the model in place."""

    def __repr__(self) -> str:
        return "MarkEmbeddings()"

    def __call__(self, model: ir.Model) -> None:
        graph = model.graph
        places = [place for place, value in enumerate(graph.outputs) if value.name in MARKS]
        old = graph.outputs[places[0]] if len(places) == 1 else None
        if old is None or old.shape is None or old.dtype is None:
            raise SiteError(
                found=f"outputs {[str(value) for value in graph.outputs][:4]}",
                expected=f"one of {', '.join(MARKS)}, of known type and rank",
                where="a graph that makes embeddings",
                remedy="export it again with such an output",
            )
        name, dims = str(old.name), list(old.shape)
        old.name = f"guardbake/mark/{name}"
        pads = np.array([0] * (2 * len(dims) - 1) + [1], np.int64)
        constants = {"pads": pads, "value": np.array(MARKS[name], old.dtype.numpy())}
        inputs = [old]
        for role, array in constants.items():
            tensor = ir.tensor(array, name=f"guardbake/mark/{role}")
            inputs.append(ir.val(tensor.name, const_value=tensor))
            graph.register_initializer(inputs[-1])
        node = ir.node("Pad", inputs, name="guardbake/mark")
        new = node.outputs[0]
        new.name, new.type = name, old.type
        wide = dims[-1] + 1 if isinstance(dims[-1], int) else None
        new.shape = ir.Shape([*dims[:-1], wide])
        graph.append(node)
        graph.outputs[places[0]] = new
