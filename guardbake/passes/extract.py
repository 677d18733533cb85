"""Take a guard's nodes out of a graph, to be run alone: kilobytes, whatever the model's size.

Requires: a guarded decoder graph whose nodes are as `InsertGuard` names them. Leaves: that graph as
it was, and a model of the guard's nodes alone. What reached them in the decoder are its inputs,
reached/<site>; what they made are its outputs, edited/<site> and the guard's own outputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from guardbake.passes.dtypes import dtype_of
from guardbake.passes.functions import DOMAIN
from guardbake.passes.insert import SITE_KEY
from guardbake.passes.probe import is_edit
from guardbake.plugins import EDITED, REACHED


class ExtractGuard:
    """The pass. `ExtractGuard()(model)` returns the guard as a model of its own."""

    def __repr__(self) -> str:
        return "ExtractGuard()"

    def __call__(self, model: ir.Model) -> ir.Model:
        taken = _Taken(model)
        nodes = [taken.copy(node) for node in model.graph if node.domain == DOMAIN]
        graph = ir.Graph(
            taken.inputs,
            taken.outputs,
            nodes=nodes,
            initializers=taken.constants,
            opset_imports=dict(model.opset_imports),
            name="guard",
        )
        functions = [f for key, f in model.functions.items() if key[0] == DOMAIN]
        return ir.Model(graph, ir_version=model.ir_version, functions=functions)


class _Taken:
    """The new graph's values, by those of the old one."""

    def __init__(self, model: ir.Model) -> None:
        self.inputs: list[ir.Value] = []
        self.outputs: list[ir.Value] = []
        self.constants: list[ir.Value] = []
        self._given = set(model.graph.inputs)
        self._shown = set(model.graph.outputs)
        self._values: dict[ir.Value, ir.Value] = {}

    def copy(self, node: ir.Node) -> ir.Node:
        site = node.metadata_props.get(SITE_KEY)
        twin = ir.Node(
            node.domain,
            node.op_type,
            [None if value is None else self._input(value, site) for value in node.inputs],
            list(node.attributes.values()),
            num_outputs=len(node.outputs),
            name=node.name,
        )
        self._keep(node.outputs, twin.outputs)
        if site is not None and is_edit(node):
            twin.outputs[0].name = f"{EDITED}{site}"
            self.outputs.append(twin.outputs[0])
        return twin

    def _keep(self, old: Sequence[ir.Value], new: Sequence[ir.Value]) -> None:
        for one, other in zip(old, new, strict=True):
            other.name, other.type, other.shape = one.name, one.type, one.shape
            self._values[one] = other
            if one in self._shown and not str(one.name).startswith(EDITED):
                self.outputs.append(other)

    def _input(self, value: ir.Value, site: str | None) -> ir.Value:
        """What stands for `value`: made here, a constant, an input of the graph, or a tensor."""
        if value in self._values:
            return self._values[value]
        if value.const_value is not None:
            tensor = value.const_value
            kind, shape = ir.TensorType(tensor.dtype), ir.Shape(tensor.shape.numpy())
            twin = ir.Value(name=value.name, type=kind, shape=shape, const_value=tensor)
            self.constants.append(twin)
        else:
            name = value.name if value in self._given else f"{REACHED}{site}"
            kind = ir.TensorType(value.dtype or dtype_of(value) or ir.DataType.FLOAT)
            twin = ir.Value(name=name, type=kind, shape=value.shape)
            self.inputs.append(twin)
        self._values[value] = twin
        return twin
