"""Let a Qwen2.5-VL vision graph work its index arrays out of the grids: `grid`, in ONNX operators.

For loops that feed what the image processor returns, and nothing that a host computed from it.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from guardbake_onnx.description import VisionGeometry

GRIDS = "image_grid_thw"
_INT = ir.DataType.INT64


def read_grids(model: ir.Model, geometry: VisionGeometry) -> None:
    """position_ids, window_index, cu_seqlens and cu_window_seqlens become nodes, image_grid_thw
    [images, 3] int64, in patches, the input from which they are computed."""
    graph = model.graph
    grids = ir.val(GRIDS, _INT, ["images", 3])
    ops = _Operators()
    tokens = _Tokens(ops, grids, geometry)
    made = {
        "position_ids": tokens.positions(),
        "window_index": tokens.window_order(),
        "cu_seqlens": tokens.frame_ends(),
        "cu_window_seqlens": tokens.window_ends(),
    }
    for old in [value for value in graph.inputs if value.name in made]:
        new = made[str(old.name)]
        new.type, new.shape = old.type, old.shape
        ir.convenience.replace_all_uses_with(old, new)
        graph.inputs.remove(old)
    graph.inputs.append(grids)
    for constant in ops.tape.initializers:
        graph.register_initializer(constant)
    graph.insert_before(graph[0], ops.tape.nodes)


class _Operators:
    """Arithmetic on int64; a number stands for a constant that broadcasts."""

    def __init__(self) -> None:
        self.tape = ir.tape.Tape()
        self._constants: dict[str, ir.Value] = {}

    def __call__(self, kind: str, *inputs: ir.Value | int, **attributes: int) -> ir.Value:
        values = [self.constant(x) if isinstance(x, int) else x for x in inputs]
        value = self.tape.op(kind, values, attributes)
        return self._named(value)

    def _named(self, value: ir.Value) -> ir.Value:
        node = self.tape.nodes[-1]
        node.name = f"/grid/{node.op_type}_{len(self.tape.nodes)}"
        for index, output in enumerate(node.outputs):
            output.name = f"{node.name}/output_{index}"
        return value

    def constant(self, content: int | list[int] | list[list[int]]) -> ir.Value:
        key, name = str(content), f"/grid/constant_{len(self._constants)}"
        if key not in self._constants:
            tensor = ir.tensor(np.array(content, np.int64), name=name)
            self._constants[key] = self.tape.initializer(tensor, name=name)
        return self._constants[key]

    def up_to(self, end: ir.Value) -> ir.Value:
        return self("Range", 0, end, 1)

    def last(self, x: ir.Value) -> ir.Value:
        return self("Gather", x, -1, axis=0)

    def ends(self, lengths: ir.Value) -> ir.Value:
        return self("CumSum", lengths, 0)

    def from_zero(self, lengths: ir.Value) -> ir.Value:
        return self("Concat", self.constant([0]), self.ends(lengths), axis=0)

    def count(self, relation: str, x: ir.Value, others: ir.Value) -> ir.Value:
        """For each x the number of others to which it has the relation."""
        held = self(relation, self("Unsqueeze", x, self.constant([1])), others)
        return self("ReduceSum", self("Cast", held, to=_INT), self.constant([1]), keepdims=0)

    def smallest_first(self, keys: ir.Value, number: ir.Value) -> ir.Value:
        """The order of the keys, which are all different."""
        size = self("Reshape", number, self.constant([1]))
        attributes = {"axis": 0, "largest": 0, "sorted": 1}
        _, order = self.tape.op_multi_out("TopK", [keys, size], attributes, num_outputs=2)
        return self._named(order)


class _Tokens:
    """Where every image token stands: merge x merge patches each, frame by frame, row by row."""

    def __init__(self, ops: _Operators, grids: ir.Value, geometry: VisionGeometry) -> None:
        self._op, self._merge = ops, geometry.merge
        self._side = geometry.window // geometry.merge // geometry.patch_size
        self._frames, self._high, self._wide = (ops("Gather", grids, n, axis=1) for n in range(3))
        self._rows = ops("Div", self._high, self._merge)
        self._columns = ops("Div", self._wide, self._merge)
        area = ops("Mul", self._rows, self._columns)
        lengths = ops("Mul", self._frames, area)
        ends = ops.ends(lengths)
        self._number = ops.last(ends)
        self._token = ops.up_to(self._number)
        self._image = ops.count("GreaterOrEqual", self._token, ends)
        within = ops("Sub", self._token, self._of(ops("Sub", ends, lengths)))
        self._frame = ops("Div", within, self._of(area))
        place, columns = ops("Mod", within, self._of(area)), self._of(self._columns)
        self._row, self._column = ops("Div", place, columns), ops("Mod", place, columns)
        self._window, self._windows = self._in_window()

    def _of(self, values: ir.Value) -> ir.Value:
        """What each token's image has."""
        return self._op("Gather", values, self._image, axis=0)

    def _in_window(self) -> tuple[ir.Value, ir.Value]:
        """Which window each token is in, counted over all images, and how many there are."""
        op, side = self._op, self._side
        across, down = (
            op("Div", op("Add", size, side - 1), side) for size in (self._columns, self._rows)
        )
        each = op("Mul", across, down)
        lengths = op("Mul", self._frames, each)
        ends = op.ends(lengths)
        first = self._of(op("Sub", ends, lengths))
        frame = op("Mul", self._frame, self._of(each))
        row = op("Mul", op("Div", self._row, side), self._of(across))
        column = op("Div", self._column, side)
        return op("Add", op("Add", first, frame), op("Add", row, column)), op.last(ends)

    def positions(self) -> ir.Value:
        """(row, column) of every patch, [patches, 2]."""
        op, merge = self._op, self._merge
        axis = op.constant([1])
        both = (op("Unsqueeze", x, axis) for x in (self._row, self._column))
        corner = op("Unsqueeze", op("Mul", op("Concat", *both, axis=1), merge), axis)
        inner = op.constant([[row, column] for row in range(merge) for column in range(merge)])
        return op("Reshape", op("Add", corner, inner), op.constant([-1, 2]))

    def window_order(self) -> ir.Value:
        """Tokens window by window, [tokens]."""
        op = self._op
        keys = op("Add", op("Mul", self._window, self._number), self._token)
        return op.smallest_first(keys, self._number)

    def frame_ends(self) -> ir.Value:
        """Where frames end, in patches, after a zero."""
        op = self._op
        ends = op.ends(self._frames)
        image = op.count("GreaterOrEqual", op.up_to(op.last(ends)), ends)
        return op.from_zero(op("Gather", op("Mul", self._high, self._wide), image, axis=0))

    def window_ends(self) -> ir.Value:
        """Where windows end, in patches, after a zero."""
        op = self._op
        bounds = op.up_to(op("Add", self._windows, 1))
        return op("Mul", op.count("Greater", bounds, self._window), self._merge**2)
