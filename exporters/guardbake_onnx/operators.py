"""Nodes to put into a finished graph, each with a name of its own."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

Content = int | float | Sequence[int] | Sequence[Sequence[int]] | npt.NDArray[np.generic]


class Operators:
    """Nodes in the order of their making, /<base>/<operator>_<n>, and the constants they read.

    Numbers and lists of whole numbers stand for int64 constants, a float for a float32.
    """

    def __init__(self, base: str) -> None:
        self._base, self._tape = base, ir.tape.Tape()
        self._constants: dict[str, ir.Value] = {}

    def __call__(
        self,
        kind: str,
        *inputs: ir.Value | Content | None,
        domain: str = "",
        **attributes: int | float | Sequence[int],
    ) -> ir.Value:
        return self.several(kind, 1, *inputs, domain=domain, **attributes)[0]

    def several(
        self,
        kind: str,
        number: int,
        *inputs: ir.Value | Content | None,
        domain: str = "",
        **attributes: int | float | Sequence[int],
    ) -> Sequence[ir.Value]:
        """All outputs of a node that has so many."""
        values = [x if x is None or isinstance(x, ir.Value) else self.constant(x) for x in inputs]
        outputs = self._tape.op_multi_out(
            kind, values, attributes, num_outputs=number, domain=domain
        )
        node = self._tape.nodes[-1]
        node.name = f"/{self._base}/{kind}_{len(self._tape.nodes)}"
        for index, output in enumerate(outputs):
            output.name = f"{node.name}/output_{index}"
        return outputs

    def constant(self, content: Content) -> ir.Value:
        kind = np.float32 if isinstance(content, float) else np.int64
        array = content if isinstance(content, np.ndarray) else np.array(content, kind)
        key = f"{array.dtype} {array.tolist()}"
        name = f"/{self._base}/constant_{len(self._constants)}"
        if key not in self._constants:
            self._constants[key] = self._tape.initializer(ir.tensor(array, name=name), name=name)
        return self._constants[key]

    def insert(self, graph: ir.Graph, before: ir.Node) -> None:
        """Put all that was made into the graph, ahead of that node."""
        self._register(graph)
        graph.insert_before(before, self._tape.nodes)

    def append(self, graph: ir.Graph) -> None:
        """Put all that was made behind the graph's last node."""
        self._register(graph)
        graph.extend(self._tape.nodes)

    def _register(self, graph: ir.Graph) -> None:
        for value in self._constants.values():
            graph.register_initializer(value)
