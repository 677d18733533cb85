"""Which tensor of a parsed network leads to which."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any


class Dataflow:
    """The paths through a network's layers, by tensor name; names are unique in a network."""

    def __init__(self, network: Any) -> None:
        self.layers: Sequence[Any] = [network.get_layer(i) for i in range(network.num_layers)]
        self._next: dict[str, list[str]] = {}
        for layer in self.layers:
            written = outputs(layer)
            for index in range(layer.num_inputs):
                tensor = layer.get_input(index)
                if tensor is not None:
                    self._next.setdefault(str(tensor.name), []).extend(written)

    def reached(
        self, starts: Iterable[str], stop: Collection[str | None] = frozenset()
    ) -> frozenset[str]:
        """`starts` and every tensor to which a path leads from one of them.

        stop: tensors at which paths end, unless they start there.
        """
        first = list(starts)
        seen = set(first)
        stack = [after for name in first for after in self._next.get(name, ())]
        while stack:
            name = stack.pop()
            if name not in seen:
                seen.add(name)
                stack += () if name in stop else self._next.get(name, ())
        return frozenset(seen)


def outputs(layer: Any) -> list[str]:
    """The names of the tensors that a layer writes."""
    return [str(layer.get_output(index).name) for index in range(layer.num_outputs)]
