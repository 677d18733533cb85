"""Let a Qwen's vision graph work its index arrays out of the grids: `grid`, in ONNX operators.

For loops that feed what the image processor returns, and nothing that a host computed from it.
"""

from __future__ import annotations

import onnx_ir as ir

from guardbake_onnx.description import VisionGeometry
from guardbake_onnx.operators import Operators

GRIDS = "image_grid_thw"
_INT, _FLOAT = ir.DataType.INT64, ir.DataType.FLOAT


def read_grids(model: ir.Model, geometry: VisionGeometry) -> None:
    """All inputs but the pixels become nodes, image_grid_thw [images, 3] int64, in patches, the
    input from which they are computed."""
    graph = model.graph
    grids = ir.val(GRIDS, _INT, ["images", 3])
    ops = _Operators("grid")
    tokens = _Tokens(ops, grids, geometry)
    made = {"position_ids": tokens.positions(), "cu_seqlens": tokens.frame_ends()}
    if geometry.window:
        made["window_index"] = tokens.window_order()
        made["cu_window_seqlens"] = tokens.window_ends()
    if geometry.position_side:
        made["interp_indices"], made["interp_weights"] = tokens.table_places(geometry.position_side)
    for old in [value for value in graph.inputs if value.name in made]:
        new = made[str(old.name)]
        if old.dtype not in (_INT, _FLOAT):
            new = ops("Cast", new, to=int(old.dtype or ir.DataType.UNDEFINED))
        new.type, new.shape = old.type, old.shape
        ir.convenience.replace_all_uses_with(old, new)
        graph.inputs.remove(old)
    graph.inputs.append(grids)
    ops.insert(graph, graph[0])


class _Operators(Operators):
    """Arithmetic on int64."""

    def up_to(self, end: ir.Value) -> ir.Value:
        return self("Range", 0, end, 1)

    def last(self, x: ir.Value) -> ir.Value:
        return self("Gather", x, -1, axis=0)

    def ends(self, lengths: ir.Value) -> ir.Value:
        return self("CumSum", lengths, 0)

    def from_zero(self, lengths: ir.Value) -> ir.Value:
        return self("Concat", [0], self.ends(lengths), axis=0)

    def count(self, relation: str, x: ir.Value, others: ir.Value) -> ir.Value:
        """For each x the number of others to which it has the relation."""
        held = self(relation, self("Unsqueeze", x, [1]), others)
        return self("ReduceSum", self("Cast", held, to=_INT), [1], keepdims=0)

    def smallest_first(self, keys: ir.Value, number: ir.Value) -> ir.Value:
        """The order of the keys, which are all different."""
        size = self("Reshape", number, [1])
        _, order = self.several("TopK", 2, keys, size, axis=0, largest=0, sorted=1)
        return order


class _Tokens:
    """Where every image token stands: merge x merge patches each, frame by frame, row by row."""

    def __init__(self, ops: _Operators, grids: ir.Value, geometry: VisionGeometry) -> None:
        self._op, self._merge = ops, geometry.merge
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
        if geometry.window:
            side = geometry.window // geometry.merge // geometry.patch_size
            self._window, self._windows = self._in_window(side)

    def _of(self, values: ir.Value) -> ir.Value:
        """What each token's image has."""
        return self._op("Gather", values, self._image, axis=0)

    def _in_window(self, side: int) -> tuple[ir.Value, ir.Value]:
        """Which window each token is in, counted over all images, and how many there are."""
        op = self._op
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
        return self._op("Concat", *(self._op("Unsqueeze", x, [1]) for x in self._places()), axis=1)

    def _places(self) -> tuple[ir.Value, ir.Value]:
        """Row and column of every patch, [patches] each."""
        op, inner = self._op, range(self._merge)
        offsets = [x for x in inner for _ in inner], [x for _ in inner for x in inner]
        row, column = (
            op("Add", op("Unsqueeze", op("Mul", corner, self._merge), [1]), offset)
            for corner, offset in zip((self._row, self._column), offsets, strict=True)
        )
        return op("Reshape", row, [-1]), op("Reshape", column, [-1])

    def table_places(self, side: int) -> tuple[ir.Value, ir.Value]:
        """Of every patch the four places of the table of positions around it, [patches, 4] int64,
        and their weights, float32."""
        op, patches = self._op, [1] * self._merge**2
        taps = []
        for place, size in zip(self._places(), (self._high, self._wide), strict=True):
            steps = op("Max", op("Sub", self._of(size), 1), 1)
            each = op("Reshape", op("Mul", op("Unsqueeze", steps, [1]), [patches]), [-1])
            taps.append(self._around(place, each, side))
        down, across = (
            [op("Unsqueeze", x, [a]) for x in t] for a, t in zip((2, 1), taps, strict=True)
        )
        places = op("Add", op("Mul", down[0], side), across[0])
        weights = op("Mul", down[1], across[1])
        return op("Reshape", places, [-1, 4]), op("Reshape", weights, [-1, 4])

    def _around(self, place: ir.Value, steps: ir.Value, side: int) -> tuple[ir.Value, ir.Value]:
        """The two of a table's `side` rows around a place of 0 to `steps`, and their weights."""
        op = self._op
        scaled = op("Mul", op("Cast", place, to=_FLOAT), float(side - 1))
        exact = op("Div", scaled, op("Cast", steps, to=_FLOAT))
        floor = op("Floor", exact)
        low, share = op("Cast", floor, to=_INT), op("Sub", exact, floor)
        pair = low, op("Min", op("Add", low, 1), side - 1)
        weights = op("Sub", 1.0, share), share
        both = ([op("Unsqueeze", x, [1]) for x in side_by_side] for side_by_side in (pair, weights))
        rows, shares = (op("Concat", *columns, axis=1) for columns in both)
        return rows, shares

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
