"""The residual stream of a decoder, read from the graph's structure alone.

A residual add is a + f(a): one of its operands is computed from the other. The stream is the
longest line of such adds, each the start of the next; norms may be fused into them
(SkipSimplifiedLayerNormalization gives the sum as an output of its own). What no token is computed
into may be added in between: features of images (DeepStack, arXiv 2406.04334). In the decoders we
guard it alternates: what attention adds, what the FFN adds. Anything else is not read at all, with
the reason, because a guess here would be a guard at the wrong tensor.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import onnx_ir as ir

from guardbake.passes.functions import DOMAIN
from guardbake.passes.locate_names import NORMS, is_constant, is_standard

EMBEDS, IDS = "inputs_embeds", "input_ids"
NO_DATA = ("Shape", "Size")
_SKIP_NORMS = {"SkipSimplifiedLayerNormalization": 3, "SkipLayerNormalization": 4}
_SUM = 3  # output of a skip norm: its two operands' sum
_RENAMED = ("Cast", "Identity")  # the same numbers, or the same in another dtype
_FLAT = ("Reshape", "Squeeze", "Unsqueeze")
_PROJECTIONS = frozenset(
    {
        "MatMul",
        "Gemm",
        "FusedMatMul",
        "MatMulNBits",
        "MatMulBnb4",
        "MatMulInteger",
        "MatMulIntegerToFloat",
        "DynamicQuantizeMatMul",
        "QLinearMatMul",
        "FusedGemm",
    }
)
_ATTENTION = frozenset(
    {
        "Attention",
        "GroupQueryAttention",
        "MultiHeadAttention",
        "PagedAttention",
        "SparseAttention",
        "DecoderMaskedMultiHeadAttention",
        "AttentionPlugin",
        "TRT_Attention",
        "Softmax",
    }
)


@dataclass(frozen=True)
class Stream:
    """ffn_outputs: of each layer, in order. reason: why the stream was not read, or nothing."""

    ffn_outputs: tuple[ir.Value, ...] = ()
    reason: str = ""


@dataclass(frozen=True, eq=False)
class _ResidualAdd:
    """node: the add, or the norm it is fused into; start, branch: its operands a and f(a)."""

    node: ir.Node
    start: ir.Value
    branch: ir.Value
    before: _ResidualAdd | None = None
    length: int = 1


def token_values(graph: ir.Graph, width: int | None = None) -> list[ir.Value]:
    """What tokens come in by: their embeddings, their ids, or both.

    Where nothing reads the embeddings but cuts of their columns, the first columns: what rides in
    others behind them, features of images for the first layers, is as an input of its own. width:
    how many the first ones are; None for what the graph says.
    """
    found: list[ir.Value] = []
    for value in graph.inputs:
        if value.name == EMBEDS:
            found += _first_columns(graph, value, width) or [value]
        elif value.name == IDS:
            found.append(value)
    return found


def _first_columns(graph: ir.Graph, value: ir.Value, width: int | None) -> list[ir.Value]:
    """What is cut from the first column on, if every other cut begins behind it; else nothing."""
    readers = [use.node for use in value.uses() if not is_standard(use.node, *NO_DATA)]
    cuts = {node: _cut_columns(graph, node) for node in readers}
    ends = {end for start, end in cuts.values() if start == 0}
    if len(ends) != 1 or (width is not None and ends != {width}):
        return []
    if any(start != 0 and start < max(ends) for start, _ in cuts.values()):
        return []
    return [node.outputs[0] for node, (start, _) in cuts.items() if start == 0]


def _cut_columns(graph: ir.Graph, node: ir.Node) -> tuple[int, int]:
    """From where up to where a node cuts columns out of its input; (-1, 0) if it does not."""
    if not is_standard(node, "Slice") or len(node.inputs) != 4 or node.graph is not graph:
        return -1, 0
    start, end, axis = (number_of(value) for value in node.inputs[1:])
    shape = node.inputs[0].shape if node.inputs[0] is not None else None
    last = (-1,) if shape is None else (-1, len(shape) - 1)
    if start is None or end is None or not 0 <= start < end or axis not in last:
        return -1, 0
    return start, end


def number_of(value: ir.Value | None) -> int | None:
    """The only number of a constant of whole numbers that stands in the graph and is no input, by
    which a caller could give another."""
    tensor = value.const_value if value is not None and not value.is_graph_input() else None
    if tensor is None or isinstance(tensor, ir.ExternalTensor) or tensor.size != 1:
        return None
    whole = tensor.dtype in (ir.DataType.INT32, ir.DataType.INT64)
    return int(tensor.numpy().item()) if whole else None


def fuses_norm(node: ir.Node) -> bool:
    """Whether the node is a residual add and the norm of its sum in one."""
    return node.op_type in _SKIP_NORMS and node.domain == "com.microsoft"


def not_a_sum(node: ir.Node) -> str:
    """Why the node is no residual add, fused into a norm or not; empty if it is one."""
    if is_standard(node, "Add"):
        return ""
    if not fuses_norm(node):
        return f"{node.op_type} {node.name}, not a residual add"
    if _input(node, _SKIP_NORMS[node.op_type]) is not None:
        return f"{node.op_type} {node.name}, which adds the bias that belongs to it"
    return ""


def sum_of(node: ir.Node) -> ir.Value | None:
    """The sum that a residual add gives out; None if the norm it is fused into keeps it."""
    index = _SUM if fuses_norm(node) else 0
    return node.outputs[index] if len(node.outputs) > index and node.outputs[index].name else None


def _is_edit(node: ir.Node) -> bool:
    return node.domain == DOMAIN and str(node.name).endswith("/edit")


def read_stream(graph: ir.Graph) -> Stream:
    """The FFN outputs of all layers, or the reason why they cannot be told."""
    lines = _Lineage(graph)
    adds: dict[ir.Node, _ResidualAdd] = {}
    last: dict[ir.Node | ir.Value, _ResidualAdd] = {}  # the add that a node's output comes behind
    for node in graph:
        operands = _operands(node)
        add = lines.residual(node, *operands) if operands else None
        if add is not None:
            before = last.get(_source(add.start))
            length = 1 if before is None else before.length + 1
            adds[node] = last[node] = _ResidualAdd(node, add.start, add.branch, before, length)
        elif operands and (joined := lines.joined_by_others(*operands)) in last:
            last[node] = last[joined]
    longest = max((add.length for add in adds.values()), default=0)
    ends = [add for add in adds.values() if add.length == longest]
    if longest < 2:
        return Stream(reason="no line of residual adds")
    if len(ends) > 1:
        names = ", ".join(str(end.node.name) for end in ends[:4])
        return Stream(reason=f"{len(ends)} lines of {longest} residual adds, ending at {names}")
    return _layers(_in_order(ends[0]), lines)


def _in_order(end: _ResidualAdd) -> list[_ResidualAdd]:
    line, add = [], end
    while True:
        line.append(add)
        if add.before is None:
            return line[::-1]
        add = add.before


def _layers(line: list[_ResidualAdd], lines: _Lineage) -> Stream:
    """The line as layers of attention and FFN."""
    for index, add in enumerate(line):
        if lines.attends(add) != (index % 2 == 0):
            what = "the FFN" if index % 2 else "attention"
            name = add.branch.name
            return Stream(reason=f"{name}, residual add {index}, is not what {what} adds")
    if len(line) % 2:
        return Stream(reason=f"{len(line)} residual adds, not two a layer")
    outputs = []
    for layer, add in enumerate(line[1::2]):
        if fuses_norm(add.node) and not_a_sum(add.node):
            return Stream(reason=f"layer {layer}: {add.node.name} adds the FFN's bias")
        value = _ffn_output(add.branch)
        if value is None:
            made = add.branch.producer()
            what = "an input" if made is None else f"{made.op_type} {made.name}"
            return Stream(reason=f"layer {layer}: the FFN ends in {what}, not in a projection")
        outputs.append(value)
    return Stream(tuple(outputs))


def _ffn_output(branch: ir.Value) -> ir.Value | None:
    """The operand of the residual add as its projection gave it, or the norm behind that; None if
    no projection did."""
    value: ir.Value = branch
    node = value.producer()
    while node is not None and (node.op_type in _RENAMED or _is_edit(node)):
        value = node.inputs[0]  # type: ignore[assignment]
        node = value.producer()
    normed = node.inputs[0] if node is not None and node.op_type in NORMS else value
    return value if normed is not None and _is_projected(normed) else None


def _is_projected(value: ir.Value) -> bool:
    """Whether it is a product with a constant matrix, with its bias, shape and scale put right."""
    node = value.producer()
    while node is not None and node.op_type not in _PROJECTIONS:
        operands = [v for v in node.inputs if v is not None and not is_constant(v)]
        passes = node.op_type in (*_RENAMED, *_FLAT) or (
            node.op_type == "Add" and len(operands) == 1
        )
        scales = node.op_type == "Mul" and any(_is_integer_product(v) for v in operands)
        if scales:
            return True
        if not passes or not operands:
            return False
        node = operands[0].producer()
    return node is not None


def _is_integer_product(value: ir.Value) -> bool:
    node = value.producer()
    if node is not None and node.op_type == "Cast" and node.inputs[0] is not None:
        node = node.inputs[0].producer()
    return node is not None and node.op_type == "MatMulInteger"


def _input(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if index < len(node.inputs) else None


def _operands(node: ir.Node) -> tuple[ir.Value, ir.Value] | None:
    """The two values that the node adds, if it may be a residual add."""
    if not is_standard(node, "Add") and not fuses_norm(node):
        return None
    one, other = _input(node, 0), _input(node, 1)
    if one is None or other is None or is_constant(one) or is_constant(other):
        return None
    return one, other


def _source(value: ir.Value) -> ir.Node | ir.Value:
    """The node that computed the value, or the graph's input, seen through casts."""
    node = value.producer()
    while node is not None and node.op_type in _RENAMED and node.inputs[0] is not None:
        value = node.inputs[0]
        node = value.producer()
    return value if node is None else node


@dataclass
class _Lineage:
    """What each value is computed from, as bit sets over the graph's nodes and inputs."""

    graph: ir.Graph
    bits: dict[ir.Node | ir.Value, int] = field(default_factory=dict)
    above: dict[ir.Node | ir.Value, int] = field(default_factory=dict)
    attention: int = 0
    tokens: int = 0

    def __post_init__(self) -> None:
        for source in (*self.graph.inputs, *self.graph):
            self.bits[source] = 1 << len(self.bits)
        for tokens in token_values(self.graph):
            self.tokens |= self.bits[tokens.producer() or tokens]
        for node in self.graph:
            made = 0
            for value in node.inputs:
                made |= 0 if value is None else self._with(value.producer() or value)
            self.above[node] = made
            if node.op_type in _ATTENTION:
                self.attention |= self.bits[node]

    def _with(self, source: ir.Node | ir.Value) -> int:
        return self.above.get(source, 0) | self.bits.get(source, 0)

    def residual(self, node: ir.Node, one: ir.Value, other: ir.Value) -> _ResidualAdd | None:
        """The add as a + f(a), if one operand is computed from the other."""
        for start, branch in ((one, other), (other, one)):
            if self._with(branch.producer() or branch) & self.bits.get(_source(start), 0):
                return _ResidualAdd(node, start, branch)
        return None

    def joined_by_others(self, one: ir.Value, other: ir.Value) -> ir.Node | ir.Value | None:
        """The source of the operand to which the other adds what no token was computed into."""
        for start, added in ((one, other), (other, one)):
            if not self._with(added.producer() or added) & self.tokens:
                return _source(start)
        return None

    def attends(self, add: _ResidualAdd) -> bool:
        """Whether attention lies between the start of the add and its branch."""
        branch = self._with(add.branch.producer() or add.branch)
        return bool(branch & ~self._with(_source(add.start)) & self.attention)
