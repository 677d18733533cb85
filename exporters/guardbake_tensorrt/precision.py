"""Half precision for a decoder's trunk, float32 for the guard that stands in it.

Requires: a decoder graph in float32 whose values state their dtypes. Leaves: the same graph with

- the trunk, which is all that depends on `inputs_embeds` or on the cache, in float16 or bfloat16:
  its values, its weights and the cache (past_key_values.*, present.*);
- the guard in float32. Its functions cast what they read and compute in float32 whatever they are
  given; the Cast by which an edit hands its result back now names the trunk's dtype, saturating in
  float16, as in the guard of a model exported in float16;
- in float32 too what depends on neither, which is the angles of the rotary embedding: float16
  counts positions exactly to 2048 only. A Cast stands where they meet the trunk;
- `inputs_embeds`, `logits` and the guard's inputs and outputs in float32, behind Casts, so that the
  caller, the embedding graph and the sampler are those of the float32 graph.

Normalisations keep their `stash_type`, by which they compute in float32 inside.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from guardbake.errors import UnsupportedError
from guardbake.passes.dtypes import settle_dtypes
from guardbake.passes.edits import FLOAT16_MAX
from guardbake.passes.functions import DOMAIN as GUARD_DOMAIN

_PREFIX: Final = "guardbake_tensorrt/precision"
_EDITED: Final = "edited"  # what an edit's function calls the value that it hands back
_CACHE: Final = ("past_key_values.", "present.")
_EMBEDS: Final = "inputs_embeds"
_FLOAT: Final = ir.DataType.FLOAT
# What angles enter the trunk by. A mask of numbers would by others, and turn infinite on the way.
_TURNS: Final = ("RotaryEmbedding", "Mul")


class CastTensor(ir.LazyTensor):
    """A weight of another file in another dtype, cast whenever it is read from `source`."""

    def __init__(self, source: ir.ExternalTensor, dtype: ir.DataType, name: str) -> None:
        super().__init__(self._cast, dtype=dtype, shape=source.shape, name=name)
        self.source = source

    def _cast(self) -> ir.TensorProtocol:
        return ir.Tensor(cast_array(self.source.numpy(), self.dtype, str(self.name)), self.dtype)


def cast_array(array: npt.NDArray[Any], dtype: ir.DataType, name: str) -> npt.NDArray[Any]:
    """The array in `dtype`. Raises UnsupportedError if a finite number becomes infinite."""
    with np.errstate(over="ignore"):
        cast = array.astype(dtype.numpy())
    if np.isfinite(cast).all() or not np.isfinite(array).all():
        return cast
    raise UnsupportedError(
        found=f"numbers up to {np.abs(array).max():g}",
        expected=f"numbers that {dtype} can hold",
        where=f"the weight {name!r}",
        remedy="choose bfloat16, which has the range of float32",
    )


def cast_trunk(model: ir.Model, dtype: ir.DataType, where: Path) -> None:
    """Rewrite a float32 decoder in place, see above; dtype is FLOAT16 or BFLOAT16.

    Raises UnsupportedError, and leaves a model of no use, if the graph is not in float32, does not
    state its dtypes, or has a mask of numbers, whose lowest float32 no float16 can be.
    """
    settle_dtypes(value for node in model.graph for value in node.outputs)
    trunk = _Trunk(model.graph, dtype, where)
    for node in list(model.graph):
        if node.domain == GUARD_DOMAIN:
            trunk.pass_guard(model, node)
        elif any(value in trunk for value in node.inputs):
            trunk.take(node)
    trunk.leave()
    for name in [name for name, value in model.graph.initializers.items() if not value.uses()]:
        if not model.graph.initializers[name].is_graph_output():
            del model.graph.initializers[name]


class _Trunk:
    """The values of the trunk found so far, cast in place, and the Casts at its borders."""

    def __init__(self, graph: ir.Graph, dtype: ir.DataType, where: Path) -> None:
        self._graph, self._dtype, self._where = graph, dtype, where
        self._values: set[ir.Value] = set()
        self._cast: dict[ir.Value, ir.Value] = {}
        embeds = next((value for value in graph.inputs if value.name == _EMBEDS), None)
        if embeds is None or embeds.dtype != _FLOAT:
            kind = "no such input" if embeds is None else embeds.dtype
            raise self._refused(f"{_EMBEDS}: {kind}", f"an input {_EMBEDS} in float32")
        cast = self._border(embeds, dtype)
        readers = [use for use in embeds.uses() if use.node is not cast.producer()]
        for use in readers:
            use.node.replace_input_with(use.idx, cast)
        self._values.add(cast)
        for value in graph.inputs:
            if str(value.name).startswith(_CACHE):
                self._add(value)

    def __contains__(self, value: ir.Value | None) -> bool:
        return value in self._values

    def pass_guard(self, model: ir.Model, node: ir.Node) -> None:
        """The guard reads any dtype; of its results only an edit's is of the trunk."""
        function = model.functions[node.op_identifier()]
        for inner, outer in zip(function.outputs, node.outputs, strict=True):
            if inner.name == _EDITED and node.inputs[0] in self:
                _hand_back(function, inner, self._dtype)
                self._add(outer)

    def take(self, node: ir.Node) -> None:
        """A node that reads the trunk: all its floats become the trunk's."""
        for index, value in enumerate(node.inputs):
            if value is None or value in self or self._kind(value, node) != _FLOAT:
                continue
            if value.producer() is not None and node.op_type not in _TURNS:
                found = (
                    f"{value.name!r}, computed beside the trunk, at {node.op_type} {node.name!r}"
                )
                raise self._refused(found, "no such values but angles, and masks in bool")
            node.replace_input_with(index, self._converted(value))
        if node.op_type == "Cast":
            return  # its `to` says what it makes
        for value in node.outputs:
            if self._kind(value, node) == _FLOAT:
                self._add(value)

    def leave(self) -> None:
        """Outputs but the cache are float32 outside."""
        for index, value in enumerate(self._graph.outputs):
            if value not in self or str(value.name).startswith(_CACHE):
                continue
            name, value.name = value.name, f"{_PREFIX}/{value.name}"
            outside = self._border(value, _FLOAT)
            outside.name = name
            self._graph.outputs[index] = outside

    def _converted(self, value: ir.Value) -> ir.Value:
        """The same numbers in the trunk's dtype: a weight cast once, or a Cast."""
        if value not in self._cast:
            tensor = value.const_value
            if value.is_initializer() and tensor is not None:
                self._cast[value] = self._weight(value, tensor)
            else:
                self._cast[value] = self._border(value, self._dtype)
        return self._cast[value]

    def _weight(self, value: ir.Value, tensor: ir.TensorProtocol) -> ir.Value:
        name = f"{value.name}.{self._dtype.name.lower()}"
        cast: ir.TensorProtocol
        if isinstance(tensor, ir.ExternalTensor):
            cast = CastTensor(tensor, self._dtype, name)
        else:
            cast = ir.Tensor(cast_array(tensor.numpy(), self._dtype, name), self._dtype, name=name)
        new = ir.val(name, const_value=cast)
        self._graph.register_initializer(new)
        return new

    def _border(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        """A Cast right behind what makes the value, or first of all for an input."""
        node = ir.node("Cast", [value], attributes={"to": dtype})
        node.name = f"{_PREFIX}/{str(value.name).removeprefix(_PREFIX + '/')}"
        cast = node.outputs[0]
        cast.name, cast.dtype, cast.shape = f"{node.name}/cast", dtype, value.shape
        maker = value.producer()
        if maker is not None:
            self._graph.insert_after(maker, node)
        else:
            self._graph.insert_before(self._graph[0], node)
        return cast

    def _add(self, value: ir.Value) -> None:
        if value.dtype not in (None, _FLOAT):
            raise self._refused(f"{value.name!r} in {value.dtype}", "a graph in float32")
        value.dtype = self._dtype
        self._values.add(value)

    def _kind(self, value: ir.Value, node: ir.Node) -> ir.DataType:
        if value.dtype is None:
            found = f"{value.name!r} at node {node.name!r}, of no stated dtype"
            raise self._refused(found, "stated dtypes")
        return value.dtype

    def _refused(self, found: str, expected: str) -> UnsupportedError:
        return UnsupportedError(
            found=found,
            expected=expected,
            where=str(self._where),
            remedy="export the decoder with guardbake, in float32",
        )


def _hand_back(function: ir.Function, edited: ir.Value, dtype: ir.DataType) -> None:
    """Let the function's result be of `dtype`: edited, or where the gate is shut what it read."""
    maker = edited.producer()
    if maker is not None and maker.op_type == "Where":
        maker = None if maker.inputs[1] is None else maker.inputs[1].producer()
    assert maker is not None
    assert maker.op_type == "Cast", f"{function.name} ends in {maker.op_type}"
    maker.attributes["to"] = ir.AttrInt64("to", dtype)
    if dtype == ir.DataType.FLOAT16:
        _saturate(function, maker)


def _saturate(function: ir.Function, cast: ir.Node) -> None:
    limits = [
        ir.node("Constant", [], attributes={"value": ir.tensor(np.array(limit, np.float32))})
        for limit in (-FLOAT16_MAX, FLOAT16_MAX)
    ]
    clip = ir.node("Clip", [cast.inputs[0], *(limit.outputs[0] for limit in limits)])
    for role, node in zip(("lowest", "highest", "saturated"), (*limits, clip), strict=True):
        node.name = node.outputs[0].name = role
    function.insert_before(cast, [*limits, clip])
    cast.replace_input_with(0, clip.outputs[0])
