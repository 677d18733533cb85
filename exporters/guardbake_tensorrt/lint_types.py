"""Mixed dtypes: a strongly typed network never casts by itself.

The ONNX schema of an operator says which of its inputs share a dtype. Dtypes that the file does not
state are followed from node to node; where one stays unknown the rule is silent, and the parser,
which refuses the same mixtures in its own words, has the last say.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import onnx
import onnx_ir as ir

from guardbake_tensorrt.finding import STANDARD, Finding

Dtypes = dict[ir.Value, ir.DataType]


def mixed_dtypes(nodes: Iterable[ir.Node], opset: int) -> Iterator[Finding]:
    """The nodes, given in topological order, whose inputs have to share a dtype and do not."""
    known: Dtypes = {}
    for node in nodes:
        if node.domain not in STANDARD:
            continue
        try:
            schema = onnx.defs.get_schema(node.op_type, opset, "")
        except onnx.defs.SchemaError:
            continue  # no operator of this opset: the parser's to refuse
        bound: dict[str, set[ir.DataType]] = {}
        for value, name in _typed(node.inputs, schema.inputs):
            dtype = None if value is None else known.get(value, value.dtype)
            if dtype is not None:
                bound.setdefault(name, set()).add(dtype)
        for dtypes in bound.values():
            if len(dtypes) > 1:
                yield _mixture(node, dtypes)
        _follow(node, schema, bound, known)


def _typed(
    values: Iterable[ir.Value | None], formal: Sequence[onnx.defs.OpSchema.FormalParameter]
) -> Iterator[tuple[ir.Value | None, str]]:
    """Each value with the type variable of its place, in so far as that one binds it."""
    for index, value in enumerate(values):
        place = formal[min(index, len(formal) - 1)] if formal else None
        if place is not None and place.is_homogeneous:
            yield value, place.type_str


def _follow(
    node: ir.Node,
    schema: onnx.defs.OpSchema,
    bound: dict[str, set[ir.DataType]],
    known: Dtypes,
) -> None:
    """What the node's outputs are, from its `to` or from the inputs that share their dtype."""
    to = node.attributes.get("to")
    for value, name in _typed(node.outputs, schema.outputs):
        if value is None or value.dtype is not None:
            continue
        if node.op_type == "Cast" and to is not None and not to.is_ref():
            known[value] = ir.DataType(to.as_int())
        elif len(bound.get(name, ())) == 1:
            (known[value],) = bound[name]


def _mixture(node: ir.Node, dtypes: set[ir.DataType]) -> Finding:
    found = " and ".join(sorted(str(dtype) for dtype in dtypes))
    return Finding(
        node.name or "",
        f"{node.op_type} of {found}, without casts",
        "inputs of one dtype: the network is strongly typed",
        "put a Cast before the input of the other dtype",
    )
