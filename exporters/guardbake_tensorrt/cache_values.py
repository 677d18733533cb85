"""What a decoder with a static cache computes once, before its first layer: columns and masks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

WRITE_INDICES: Final = "write_indices"
PREFIX: Final = "guardbake_tensorrt/static_cache"


class CacheValues:
    """The new input and what follows from it; the graph's `attention_mask` becomes [B, C].

    capacity: C, in tokens. write_indices: [B] int32, a graph input from now on. mask: [B, 1, S, C]
    bool, the columns that each token of this call attends to; itself always, for padding too needs
    a key. guard_mask: [B, C + S] int64, the mask as a growing cache would have it, columns from
    before this call and then its own tokens; columns in between count as padding, which no guard
    sees.
    """

    def __init__(
        self, graph: ir.Graph, attention_mask: ir.Value, tokens: ir.Value, capacity: int
    ) -> None:
        """attention_mask: the graph's, [B, P + S] until now. tokens: any input [B, S, ...]."""
        self._graph = graph
        self._nodes: list[ir.Node] = []
        self.capacity = capacity
        self.attention_mask = attention_mask
        batch = _size(attention_mask, 0)
        attention_mask.shape = ir.Shape([batch, capacity])
        self.write_indices = ir.val(WRITE_INDICES, ir.DataType.INT32, [batch])
        graph.inputs.insert(list(graph.inputs).index(attention_mask) + 1, self.write_indices)
        columns = self.constant("columns", np.arange(capacity))
        start = self._op("Cast", [self.write_indices], to=ir.DataType.INT64)
        start = self._op("Unsqueeze", [start, self.constant("one", np.array([1]))])
        placed = self._op("Add", [start, self._indices_of(tokens)])
        self.mask = self._causal(columns, placed)
        self.guard_mask = self._growing(columns, start, placed)
        graph.insert_before(graph[0], self._nodes)

    def constant(self, role: str, array: npt.NDArray[np.generic]) -> ir.Value:
        """A new initialiser of the graph."""
        name = f"{PREFIX}/{role}"
        value = ir.val(name, const_value=ir.tensor(array, name=name))
        self._graph.register_initializer(value)
        return value

    def _indices_of(self, tokens: ir.Value) -> ir.Value:
        """0 to S - 1, [S]."""
        count = self._op("Shape", [tokens], start=1, end=2)
        count = self._op("Squeeze", [count, self.constant("zero", np.array([0]))])
        first, step = (self.constant(role, np.array(i)) for i, role in enumerate(("from", "step")))
        return self._op("Range", [first, count, step])

    def _causal(self, columns: ir.Value, placed: ir.Value) -> ir.Value:
        real = self._op("Cast", [self.attention_mask], to=ir.DataType.BOOL)
        real = self._op("Unsqueeze", [real, self.constant("heads_queries", np.array([1, 2]))])
        query = self._op("Unsqueeze", [placed, self.constant("heads_keys", np.array([1, 3]))])
        earlier = self._op("And", [self._op("LessOrEqual", [columns, query]), real])
        return self._op("Or", [earlier, self._op("Equal", [columns, query])])

    def _growing(self, columns: ir.Value, start: ir.Value, placed: ir.Value) -> ir.Value:
        before = self._op("Cast", [self._op("Less", [columns, start])], to=ir.DataType.INT64)
        before = self._op("Mul", [self.attention_mask, before])
        now = self._op("GatherElements", [self.attention_mask, placed], axis=1)
        return self._op("Concat", [before, now], axis=1)

    def _op(self, op_type: str, inputs: Sequence[ir.Value], **attributes: int) -> ir.Value:
        node = ir.node(op_type, inputs, attributes=attributes)
        node.name = f"{PREFIX}/{op_type}_{len(self._nodes)}"
        node.outputs[0].name = f"{node.name}/output_0"
        self._nodes.append(node)
        return node.outputs[0]


def _size(value: ir.Value, axis: int) -> int | str | None:
    dimension = value.shape[axis] if value.shape is not None else None
    return dimension.value if isinstance(dimension, ir.SymbolicDim) else dimension
