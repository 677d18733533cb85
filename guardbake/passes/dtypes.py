"""Give located values the dtype that their exporter left out.

Requires: values of a graph, with or without a dtype. Leaves: the same graph, and a dtype at each of
them that can be told from what computes it.
"""

from __future__ import annotations

from collections.abc import Iterable

import onnx_ir as ir

# Operators whose first output has the dtype of some inputs: which ones, in the order of asking.
_FOLLOWS: dict[str, tuple[int, ...]] = {
    "MatMulNBits": (2, 0),
    "DequantizeLinear": (1,),
    "SkipSimplifiedLayerNormalization": (2, 0, 1),
    "SkipLayerNormalization": (2, 0, 1),
    "MatMulIntegerToFloat": (2, 3),
    "DynamicQuantizeMatMul": (0, 2),
} | dict.fromkeys(("MatMul", "Gemm", "FusedMatMul", "Add", "Mul", "Sub", "Div"), (1, 0))
_FOLLOWS |= dict.fromkeys(("Reshape", "Squeeze", "Unsqueeze", "Identity", "Transpose"), (0,))


def settle_dtypes(values: Iterable[ir.Value]) -> None:
    for value in values:
        if value.dtype is None:
            found = dtype_of(value)
            if found is not None:
                value.dtype = found


def dtype_of(value: ir.Value) -> ir.DataType | None:
    """What is written at the value, or follows from its producer; None if neither tells."""
    tried: set[ir.Value] = set()
    stack = [value]
    while stack:
        current = stack.pop()
        if current in tried:
            continue
        tried.add(current)
        if current.dtype is not None:
            return current.dtype
        node = current.producer()
        if node is None:
            continue
        if node.op_type == "Cast" and "to" in node.attributes:
            return ir.DataType(node.attributes["to"].as_int())
        asked = [node.inputs[i] for i in _FOLLOWS.get(node.op_type, ()) if i < len(node.inputs)]
        stack += [each for each in reversed(asked) if each is not None]
    return None
