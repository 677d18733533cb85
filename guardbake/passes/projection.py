"""The last projection of an FFN as the graph computes it: y = x W + b, and where W and b stand.

Requires: a located FFN output. Leaves: the graph as it was.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NoReturn

import onnx_ir as ir

from guardbake.errors import UnsupportedError
from guardbake.site import Site

_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
Slot = tuple[ir.Node, int]


@dataclass(frozen=True)
class Projection:
    """output: y [B, S, d], with the bias if there is one. node: the MatMul or Gemm.

    weight, bias: the node and the input where an initialiser enters; no bias, None. transposed: the
    weight is stored [d, d_ff] and not [d_ff, d].
    """

    output: ir.Value
    node: ir.Node
    weight: Slot
    bias: Slot | None
    transposed: bool

    @property
    def weight_tensor(self) -> ir.TensorProtocol:
        return _constant(self.weight)

    @property
    def bias_tensor(self) -> ir.TensorProtocol | None:
        return None if self.bias is None else _constant(self.bias)


def projection_of(output: ir.Value, site: Site, width: int) -> Projection:
    """How `output` is computed. Raises UnsupportedError unless W and b are plain initialisers."""
    node, bias = output.producer(), None
    if node is not None and node.op_type == "Add":
        slots = [index for index in (0, 1) if _is_initializer(node.inputs[index])]
        if len(slots) != 1:
            _refuse(site, f"an Add of {len(slots)} initialisers")
        bias, other = (node, slots[0]), node.inputs[1 - slots[0]]
        node = other.producer() if other is not None else None
    if node is None or node.domain not in ("", "ai.onnx") or node.op_type not in ("MatMul", "Gemm"):
        what = "a graph input" if node is None else f"{node.op_type} {node.name}"
        _refuse(site, f"{what} as its producer")
    weight, transposed = _weight_slot(node, site)
    if node.op_type == "Gemm":
        transposed ^= _gemm_transposes(node, site)
        if len(node.inputs) > 2 and node.inputs[2] is not None:
            if bias is not None:
                _refuse(site, "a bias in Gemm and another in Add")
            bias = (node, 2)
    found = Projection(output, node, weight, bias, transposed)
    _check(found, site, width)
    return found


def _is_initializer(value: ir.Value | None) -> bool:
    """A number that nobody outside can override."""
    return value is not None and value.is_initializer() and not value.is_graph_input()


def _weight_slot(node: ir.Node, site: Site) -> tuple[Slot, bool]:
    """Where the weight enters, directly or through a Transpose of its two axes."""
    value = node.inputs[1]
    if _is_initializer(value):
        return (node, 1), False
    made = value.producer() if value is not None else None
    if made is not None and made.op_type == "Transpose" and _is_initializer(made.inputs[0]):
        if len(tuple(made.outputs[0].uses())) != 1:
            _refuse(site, f"a weight that {made.name} transposes for several readers")
        return (made, 0), True
    _refuse(site, f"a weight computed by {made.op_type if made is not None else 'nobody'}")


def _gemm_transposes(node: ir.Node, site: Site) -> bool:
    """Whether Gemm stores its weight as [d, d_ff]; any other product than x W + b is refused."""
    values = {name: attribute.value for name, attribute in node.attributes.items()}
    odd = {k: v for k, v in values.items() if k != "transB" and v != (0 if k == "transA" else 1)}
    if odd:
        _refuse(site, f"a Gemm with {odd}")
    return bool(values.get("transB", 0))


def _constant(slot: Slot) -> ir.TensorProtocol:
    node, index = slot
    value = node.inputs[index]
    assert value is not None
    assert value.const_value is not None
    return value.const_value


def _check(found: Projection, site: Site, width: int) -> None:
    weight, bias = found.weight_tensor, found.bias_tensor
    axis = 0 if found.transposed else 1
    if weight.dtype not in _FLOATS:
        _refuse(site, f"a weight of dtype {weight.dtype}")
    if len(weight.shape) != 2 or weight.shape[axis] != width:
        _refuse(site, f"a weight of shape {list(weight.shape)}, {width} expected on axis {axis}")
    if bias is not None and (bias.dtype, list(bias.shape)) != (weight.dtype, [width]):
        _refuse(site, f"a bias of {bias.dtype} {list(bias.shape)}")


def _refuse(site: Site, found: str) -> NoReturn:
    raise UnsupportedError(
        found=found,
        expected="an FFN output x W + b by MatMul, MatMul and Add, or Gemm, of float initialisers",
        where=f"{site} of the decoder graph",
        remedy="apply the guard without folding, or fold into the graph before it is quantised",
    )
