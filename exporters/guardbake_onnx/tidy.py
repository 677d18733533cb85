"""Make a traced graph fit to read and to ship: standard operators, module names, no file paths.

requires: a graph that torch.onnx.export returned unoptimised (initializers have module names, nodes
carry the scopes of the modules they come from). leaves: the same function, weights already
transposed, every node and value named after its module, no metadata.
"""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterable, Mapping

import onnx_ir as ir
import onnxscript.optimizer
import onnxscript.rewriter.onnx_fusions as onnx_fusions
from onnx_ir.passes import common

from guardbake.errors import SiteError

from guardbake_onnx.parameters import (
    Parameter,
    mark,
    only_marks,
    parameter_of,
    parameters_of,
)
from guardbake_onnx.rotary import fuse_doubled_rotary

_SHAPE_CONSTANT = 8  # elements; the longest shape a graph of ours spells out has 5
SCOPES = "pkg.torch.onnx.name_scopes"
_NUMBERED = re.compile(r"([A-Za-z_]\w*)\.(\d+)(?=\.|$)")


def transpose_weights(model: ir.Model) -> None:
    """Let a parameter that is a transposed matrix be asked for in that layout.

    A runtime would otherwise hold both copies, or fold them again at each load.
    """
    graph = model.graph
    for weight, parameter in parameters_of(graph):
        if weight.shape is None or len(weight.shape) != 2:
            continue
        users = [user.node for user in weight.uses() if _is_matrix_transpose(user.node)]
        if not users:
            continue
        name = re.sub(r"\.weight$", "", str(weight.name)) + ".MatMul.weight"
        rows, columns = weight.shape
        value = ir.Value(name=name, shape=ir.Shape([columns, rows]), type=weight.type)
        mark(value, Parameter(parameter.name, transposed=True))
        graph.inputs.append(value)
        for node in users:
            ir.convenience.replace_all_uses_with(node.outputs[0], value)
            graph.remove(node, safe=True)
        if not weight.uses():
            graph.inputs.remove(weight)


def simplify(model: ir.Model) -> None:
    """Fold small constants, fuse into the standard operators of opset 23, drop what is not used."""
    onnxscript.optimizer.optimize(model)
    onnx_fusions.fuse(model)
    _cast_around_norms(model.graph)
    fuse_doubled_rotary(model)
    read_sizes_once(model.graph)
    common.CommonSubexpressionEliminationPass()(model)
    # shape constants only: equal norm weights of two layers stay two weights
    common.DeduplicateInitializersPass(size_limit=_SHAPE_CONSTANT)(model)
    common.RemoveUnusedNodesPass()(model)
    common.RemoveUnusedFunctionsPass()(model)  # type: ignore[no-untyped-call]
    common.RemoveUnusedOpsetsPass()(model)
    for node in model.graph:
        # the rotary fusion makes these without a type
        if node.op_type in {"Cos", "Sin"} and node.outputs[0].type is None and node.inputs[0]:
            node.outputs[0].type, node.outputs[0].shape = node.inputs[0].type, node.inputs[0].shape


def _cast_around_norms(graph: ir.Graph) -> None:
    """Where a norm computes in more precision than the stream, put back the cast before it, which
    its fusion took in and onnxruntime misses, and give the one behind it its scopes again."""
    for norm in [node for node in graph if node.op_type == "RMSNormalization"]:
        x, scale = norm.inputs[:2]
        if x is None or scale is None or scale.dtype is None or x.dtype == scale.dtype:
            continue
        cast = ir.node("Cast", [x], {"to": scale.dtype})
        cast.outputs[0].type, cast.outputs[0].shape = scale.type, x.shape
        graph.insert_before(norm, cast)
        norm.replace_input_with(0, cast.outputs[0])
        for node in (cast, *(use.node for use in norm.outputs[0].uses())):
            if node.op_type == "Cast" and not scopes_of(node):
                node.metadata_props[SCOPES] = norm.metadata_props[SCOPES]


def read_sizes_once(graph: ir.Graph) -> None:
    """Read each symbolic size from the first input that has it, ahead of everything else.

    The exporter reads it from any input of that size, which one depends on how many there are.
    """
    fed = [value for value in graph.inputs if parameter_of(value) is None]
    places: dict[str, tuple[int, int]] = {}
    for index, value in enumerate(fed):
        for axis, size in enumerate(value.shape or ()):
            places.setdefault(str(size), (index, axis))
    readers: dict[tuple[int, int], ir.Node] = {}
    for node in list(graph):
        source = node.inputs[0] if node.op_type == "Shape" else None
        start, end = (node.attributes.get_int(name, -1) for name in ("start", "end"))
        if source not in fed or source.shape is None or start < 0 or end != start + 1:
            continue
        place = places[str(source.shape[start])]
        if place in readers:
            ir.convenience.replace_all_uses_with(node.outputs[0], readers[place].outputs[0])
            graph.remove(node, safe=True)
            continue
        node.replace_input_with(0, fed[place[0]])
        node.attributes["start"] = ir.AttrInt64("start", place[1])
        node.attributes["end"] = ir.AttrInt64("end", place[1] + 1)
        readers[place] = node
    graph.remove(readers.values())
    for place in sorted(readers, reverse=True):
        graph.insert_before(graph[0], readers[place])


def leaving_values(graph: ir.Graph, module: str) -> list[ir.Value]:
    """Values computed inside the module (a path as traced) and used outside it, in graph order."""
    inside = {node for node in graph if module in scopes_of(node)}
    outputs = set(graph.outputs)
    return [
        value
        for node in graph
        if node in inside
        for value in node.outputs
        if value in outputs or any(user.node not in inside for user in value.uses())
    ]


def single_leaving_value(graph: ir.Graph, module: str) -> ir.Value:
    """The module's only leaving value; SiteError names what was found otherwise."""
    found = leaving_values(graph, module)
    if len(found) != 1:
        raise SiteError(
            found=f"{len(found)} values leaving it: {[value.name for value in found]}",
            expected="exactly one, the FFN output",
            where=f"module {module} of the traced graph",
            remedy="report the model: its FFN has another shape than the family file says",
        )
    return found[0]


def scopes_of(node: ir.Node) -> list[str]:
    """Paths of the modules the node lies in, outermost first; empty if it is of no module."""
    text = node.metadata_props.get(SCOPES)
    return [] if text is None else list(ast.literal_eval(text))


def name_by_module(
    model: ir.Model, roots: Mapping[str, str], fixed: Mapping[ir.Value, str]
) -> None:
    """Name nodes /module/path/Operator, their values .../output_i, weights module.path.weight.

    roots: traced root module -> its name in the graph ("language_model" -> "model").
    fixed: names that particular values get whatever their node is called. Inputs and outputs of the
    graph keep their names.
    """
    graph = model.graph
    seen: Counter[str] = Counter()
    kept = set(graph.outputs)
    for node in graph:
        base = "/".join(["", *_segments(_module_of(node), roots), node.op_type])
        seen[base] += 1
        node.name = base if seen[base] == 1 else f"{base}_{seen[base] - 1}"
        for index, value in enumerate(node.outputs):
            if value not in kept:
                value.name = fixed.get(value, f"{node.name}/output_{index}")
    for value, _ in parameters_of(graph):
        value.name = ".".join(_segments(str(value.name), roots))
    constants = 0
    for value in list(graph.initializers.values()):
        old = str(value.name)
        if "." in old:
            value.name = ".".join(_segments(old, roots))
        else:
            value.name = f"constant_{constants}"
            constants += 1


def strip_metadata(model: ir.Model) -> None:
    """Remove what tracing left behind: stack traces hold paths of the machine that exported."""
    common.ClearMetadataAndDocStringPass()(model)
    model.graph.name = "main_graph"
    model.producer_name, model.producer_version = "guardbake", None
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    for value in _values(model.graph):
        only_marks(value)


def rename_dimension(graph: ir.Graph, old: str, new: str) -> None:
    """Give one symbolic dimension another name in every value's shape."""
    for value in _values(graph):
        if value.shape is not None and any(_symbol(d) == old for d in value.shape):
            value.shape = ir.Shape([new if _symbol(d) == old else d for d in value.shape])


def _values(graph: ir.Graph) -> Iterable[ir.Value]:
    yield from graph.inputs
    yield from graph.initializers.values()
    for node in graph:
        yield from node.outputs


def _symbol(dimension: int | ir.SymbolicDim) -> str | None:
    return dimension.value if isinstance(dimension, ir.SymbolicDim) else None


def _is_matrix_transpose(node: ir.Node) -> bool:
    permutation = node.attributes.get("perm")
    swaps = permutation is None or list(permutation.as_ints()) == [1, 0]
    return node.op_type == "Transpose" and node.domain == "" and swaps


def _module_of(node: ir.Node) -> str:
    """The innermost module: the scopes end with the name of the operation itself."""
    scopes = scopes_of(node)
    return scopes[-2] if len(scopes) > 1 and not scopes[-2].startswith("_empty_nn") else ""


def _segments(path: str, roots: Mapping[str, str]) -> list[str]:
    """Module path -> names; a number stays with its list: "layers.0"."""
    if not path:
        return []
    protected = _NUMBERED.sub(r"\1#\2", path)
    first, *rest = protected.replace(".", "/").replace("#", ".").split("/")
    return [roots.get(first, first), *rest]
