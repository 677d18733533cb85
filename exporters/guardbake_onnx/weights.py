"""Give a captured graph its weights: streamed out of the checkpoint, or left where they lie there.

Either way no more than one tensor is in memory at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch

from guardbake.vlm.tensors import StoredTensor

from guardbake_onnx.parameters import Parameter, give_values, parameters_of
from guardbake_onnx.untransposed import cast_parameters, take_untransposed

IR_TYPES: dict[torch.dtype, ir.DataType] = {
    torch.float32: ir.DataType.FLOAT,
    torch.float16: ir.DataType.FLOAT16,
    torch.bfloat16: ir.DataType.BFLOAT16,
}
_TORCH_TYPES = {kind: dtype for dtype, kind in IR_TYPES.items()}
_ROWS = 64  # turned at a time
_BLOCK = 1 << 20  # numbers converted at a time; a few MB stay in the processor's cache


def stream(model: ir.Model, tensors: Mapping[str, StoredTensor]) -> None:
    """Let the graph's parameters be initializers that are read when the graph is written.

    tensors: by the parameters' names. Cast to the graph's type and transposed on the way.
    """
    give_values(
        model.graph,
        {
            value: StreamedTensor(tensors[parameter.name], parameter, value)
            for value, parameter in parameters_of(model.graph)
        },
    )


def link(model: ir.Model, tensors: Mapping[str, StoredTensor]) -> list[Path]:
    """Let the graph's parameters be external data in the checkpoint's files, wherever they lie.

    Products with a transposed matrix become Gemm with transB; types that differ from the graph's
    are cast in the graph. Returns the files, which must stand beside the graph under their names.
    """
    graph = model.graph
    found = parameters_of(graph)
    take_untransposed(graph)
    stored = {value: tensors[parameter.name] for value, parameter in found if value.uses()}
    cast_parameters(graph, {v: IR_TYPES[t.torch_dtype] for v, t in stored.items()})
    give_values(graph, {value: _external(value, tensor) for value, tensor in stored.items()})
    return sorted({tensor.file for tensor in stored.values()})


def _external(value: ir.Value, tensor: StoredTensor) -> ir.ExternalTensor:
    return ir.ExternalTensor(
        tensor.file.name,
        tensor.offset,
        tensor.nbytes,
        IR_TYPES[tensor.torch_dtype],
        shape=ir.Shape(list(tensor.shape)),
        name=str(value.name),
        base_dir=tensor.file.parent,
    )


class StreamedTensor(ir.LazyTensor):
    """A checkpoint's tensor in the type and layout that a graph wants it in.

    Writing it to a file holds the stored tensor (only a block of it, if it is not transposed) and
    one converted block.
    """

    def __init__(self, stored: StoredTensor, parameter: Parameter, value: ir.Value) -> None:
        assert value.dtype is not None
        assert isinstance(value.shape, ir.Shape)
        self._stored = stored
        self._transposed = parameter.transposed
        super().__init__(self._whole, dtype=value.dtype, shape=value.shape, name=value.name)

    def _whole(self) -> ir.TensorProtocol:
        data = b"".join(self._blocks())
        array = torch.frombuffer(bytearray(data), dtype=_TORCH_TYPES[self.dtype])
        return ir.tensor(array.reshape(self.shape.numpy()), name=self.name)

    def tofile(self, file: Any) -> None:
        """Write the bytes, block by block."""
        for block in self._blocks():
            file.write(block)

    def _blocks(self) -> Iterator[memoryview]:
        stored, wanted = self._stored, _TORCH_TYPES[self.dtype]
        if not self._transposed:
            for start in range(0, stored.size, _BLOCK):
                yield _bytes(stored.read(start, min(start + _BLOCK, stored.size)).to(wanted))
            return
        rows, columns = stored.shape
        matrix = stored.read().view(rows, columns)
        step = max(1, _BLOCK // rows)
        for first in range(0, columns, step):
            yield _bytes(_turned(matrix[:, first : first + step], wanted))


def _turned(matrix: torch.Tensor, wanted: torch.dtype) -> torch.Tensor:
    """[rows, columns] -> [columns, rows], some rows at a time: two to five times as fast."""
    rows, columns = matrix.shape
    turned = torch.empty(columns, rows, dtype=wanted)
    for first in range(0, rows, _ROWS):
        turned[:, first : first + _ROWS] = matrix[first : first + _ROWS].t()
    return turned


def _bytes(tensor: torch.Tensor) -> memoryview:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().data
