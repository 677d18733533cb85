"""Is a graph's attention mask the plain one: causal, over real tokens?

A static cache needs a mask of another shape, so the graph's own cannot stay; before it is replaced
it has to be known what it says. It is read by running it, not by its spelling, which changes with
every version of an exporter.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator

from guardbake.errors import UnsupportedError

# (batch, past, new tokens): a prefill, a decode step, a chunk of a prompt on a cache
_SIZES: Final = ((2, 0, 4), (3, 4, 1), (2, 3, 4))
# Axes, 0 and 1 are all that such a mask is spelled with; a larger number would be a window, which
# masks of so few tokens cannot show.
_LARGEST_CONSTANT: Final = 3


def require_causal(graph: ir.Graph, mask: ir.Value, dimensions: Sequence[str], where: Path) -> None:
    """`mask` [B, 1, S, P + S] bool must be, for token i of this call and key j,

        (j <= P + i and attention_mask[b, j]) or j == P + i

    dimensions: what the graph calls batch, past and new tokens. Raises UnsupportedError.
    """
    part = _computing(graph, mask, where)
    names = {value.name for value in part.inputs}
    if "attention_mask" not in names:
        raise _unknown(f"a mask computed from {sorted(map(str, names))}", where)
    evaluator = ReferenceEvaluator(ir.to_proto(ir.Model(part, ir_version=10)))
    rng = np.random.default_rng(0)
    for sizes in _SIZES:
        named = dict(zip(dimensions, sizes, strict=True))
        batch, past, new = sizes
        real = rng.integers(0, 2, (batch, past + new))
        shapes = [value for value in part.inputs if value.name != "attention_mask"]
        feeds = {str(value.name): _zeros(value, named, where) for value in shapes}
        results: Any = evaluator.run(None, feeds | {"attention_mask": real})
        found = np.asarray(results[0])
        key, query = np.arange(past + new), past + np.arange(new)[:, None]
        wanted = ((key <= query) & (real[:, None, None] == 1)) | (key == query)
        if found.dtype != np.bool_ or not np.array_equal(found, wanted):
            raise _unknown("a mask that says something else", where)


def _computing(graph: ir.Graph, mask: ir.Value, where: Path) -> ir.Graph:
    """The part of the graph that computes the mask, with the inputs that it asks for alone."""
    inputs: list[ir.Value | str] = list(graph.inputs)
    try:
        part = ir.convenience.extract(graph, inputs, [mask])
    except ValueError as error:
        raise _unknown(f"a mask that is not computed from the inputs ({error})", where) from error
    used: dict[ir.Value, None] = {}
    for node in part:
        if node.domain not in ("", "ai.onnx"):
            raise _unknown(f"a mask computed by {node.domain}::{node.op_type}", where)
        used |= dict.fromkeys(value for value in node.inputs if value is not None)
    for value in used:
        tensor = ir.convenience.get_const_tensor(value)
        if tensor is not None and np.abs(tensor.numpy()).max(initial=0) > _LARGEST_CONSTANT:
            raise _unknown(f"a mask computed with {value.name!r}", where)
    part.inputs[:] = [value for value in part.inputs if value in used]
    return part


def _zeros(value: ir.Value, named: dict[str, int], where: Path) -> npt.NDArray[Any]:
    """What a mask may ask of other inputs is their shape."""
    sizes: list[int] = []
    for dimension in value.shape or ():
        size = dimension if isinstance(dimension, int) else named.get(str(dimension.value))
        if size is None:
            raise _unknown(f"a mask that depends on {value.name!r} {value.shape}", where)
        sizes.append(size)
    assert value.dtype is not None
    return np.zeros(sizes, value.dtype.numpy())


def _unknown(found: str, where: Path) -> UnsupportedError:
    return UnsupportedError(
        found=found,
        expected="causal attention over the tokens that attention_mask calls real",
        where=f"the attention of {where}",
        remedy="keep the growing cache for this graph",
    )
