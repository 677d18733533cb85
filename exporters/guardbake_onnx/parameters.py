"""Graphs without weights: a parameter is an input that says which tensor of the model it is.

Such a graph is valid ONNX, is stored in kilobytes, and no pass can fold what is not there. `stream`
and `linked` make the inputs initializers with data.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import onnx_ir as ir

_NAME = "guardbake.parameter"
_TRANSPOSED = "guardbake.transposed"


@dataclass(frozen=True)
class Parameter:
    """name: dotted path in the model. transposed: whether the graph wants the matrix [in, out]."""

    name: str
    transposed: bool

    def named(self, name: str) -> Parameter:
        """The parameter of another name, wanted in the same layout."""
        return Parameter(name, self.transposed)


def mark(value: ir.Value, parameter: Parameter) -> None:
    """Note on an input which parameter it stands for."""
    value.metadata_props[_NAME] = parameter.name
    value.metadata_props.pop(_TRANSPOSED, None)
    if parameter.transposed:
        value.metadata_props[_TRANSPOSED] = "yes"


def mark_parameters(graph: ir.Graph, names: Collection[str]) -> None:
    """Turn the initializers of these names into inputs; each is the parameter of its name."""
    for name in [name for name in graph.initializers if name in names]:
        value = graph.initializers.pop(name)
        value.const_value = None
        mark(value, Parameter(name, transposed=False))
        graph.inputs.append(value)


def parameter_of(value: ir.Value) -> Parameter | None:
    """Which parameter an input stands for; None for an input that the caller feeds."""
    name = value.metadata_props.get(_NAME)
    return None if name is None else Parameter(name, _TRANSPOSED in value.metadata_props)


def parameters_of(graph: ir.Graph) -> list[tuple[ir.Value, Parameter]]:
    """The parameters among the inputs, in their order."""
    found = ((value, parameter_of(value)) for value in graph.inputs)
    return [(value, parameter) for value, parameter in found if parameter is not None]


def only_marks(value: ir.Value) -> None:
    """Drop all metadata of a value but what makes it a parameter."""
    for key in set(value.metadata_props) - {_NAME, _TRANSPOSED}:
        del value.metadata_props[key]


def order_parameters(graph: ir.Graph, roots: Mapping[str, str]) -> None:
    """Put the parameters last and in the order in which nodes read them; drop those none reads.

    roots: first part of a parameter's path as traced -> what it is in the model.
    """
    fed = [value for value in graph.inputs if parameter_of(value) is None]
    read: dict[ir.Value, None] = {}
    for node in graph:
        read.update(dict.fromkeys(v for v in node.inputs if v is not None and parameter_of(v)))
    for value in read:
        parameter = parameter_of(value)
        assert parameter is not None
        root, dot, rest = parameter.name.partition(".")
        mark(value, parameter.named(f"{roots[root]}{dot}{rest}"))
    graph.inputs.clear()
    graph.inputs.extend([*fed, *read])


def give_values(graph: ir.Graph, tensors: Mapping[ir.Value, ir.TensorProtocol]) -> None:
    """Turn inputs that are parameters into initializers with these tensors."""
    fed = [value for value in graph.inputs if value not in tensors]
    graph.inputs.clear()
    graph.inputs.extend(fed)
    for value, tensor in tensors.items():
        value.metadata_props.clear()
        value.const_value = tensor
        graph.register_initializer(value)
