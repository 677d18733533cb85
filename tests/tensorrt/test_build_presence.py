"""A graph that still names its guard and no longer has it: no pack is asked, the network tells."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from guardbake.errors import UnsupportedError

from guardbake_tensorrt import Backend
from guardbake_tensorrt.build import check_graph
from guardbake_tensorrt.lower import read_graph


def _edits(model: ir.Model) -> Iterator[ir.Node]:
    for node in model.graph:
        if node.domain == "guardbake" and str(node.name).endswith("/edit"):
            yield node


def _identity(model: ir.Model) -> None:
    """Each edit's body gives back what it takes: what folding leaves where alpha is 0."""
    for edit in _edits(model):
        function = model.functions[edit.op_identifier()]
        same = ir.node("Identity", [function.inputs[0]], name="same")
        same.outputs[0].name = "same"
        function.append(same)
        function.outputs[0] = same.outputs[0]


def _closed(model: ir.Model) -> None:
    """The edits' gate is a constant: what folding leaves where it never opens."""
    never = ir.node("Constant", [], attributes={"value": ir.tensor(np.zeros((1, 1), bool))})
    never.name, never.outputs[0].name = "never", "never"
    never.outputs[0].dtype = ir.DataType.BOOL
    edits = list(_edits(model))
    model.graph.insert_before(edits[0], never)
    for edit in edits:
        gates = [i for i, v in enumerate(edit.inputs) if v and v.dtype == ir.DataType.BOOL]
        edit.replace_input_with(gates[0], never.outputs[0])


def _bypassed(model: ir.Model) -> None:
    """The residual adds what was there before the edit."""
    for edit in _edits(model):
        for use in list(edit.outputs[0].uses()):
            use.node.replace_input_with(use.idx, edit.inputs[0])


def _half_bypassed(model: ir.Model) -> None:
    """The residual adds the mean of both."""
    for edit in _edits(model):
        users = list(edit.outputs[0].uses())
        around = ir.node("Mean", [edit.inputs[0], edit.outputs[0]], name="around")
        model.graph.insert_after(edit, around)
        for use in users:
            use.node.replace_input_with(use.idx, around.outputs[0])


_PLANTS: list[Callable[[ir.Model], None]] = [_identity, _closed, _bypassed, _half_bypassed]


@pytest.mark.parametrize("plant", _PLANTS, ids=lambda plant: plant.__name__)
def test_a_guard_in_name_only_is_not_compiled(
    plant: Callable[[ir.Model], None], guarded: Any, backend: Backend
) -> None:
    model = read_graph(guarded.path)
    plant(model)
    with pytest.raises(UnsupportedError, match="guardbake/") as caught:
        check_graph(model, guarded.path, backend, guarded.nodes, "logits")
    assert caught.value.exit_code == 3


def test_the_guard_that_is_there_is_counted(guarded: Any, backend: Backend) -> None:
    model = read_graph(guarded.path)
    found = check_graph(model, guarded.path, backend, guarded.nodes, "logits")
    assert [each.node for each in found.guard] == list(guarded.nodes)
    layers = [layer for each in found.guard for layer in each.layers]
    assert len(set(layers)) == len(layers) < found.parsed.network.num_layers
