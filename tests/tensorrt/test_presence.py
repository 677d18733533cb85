"""The proof that the guard is compiled in, and that it refuses a guard that is not."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import pytest

from guardbake.errors import SiteError

from guardbake_tensorrt import Backend
from guardbake_tensorrt.lower import lower_graph, read_graph
from guardbake_tensorrt.network import ParsedNetwork, parse_network
from guardbake_tensorrt.presence import origins, prove_in_graph, prove_in_network


@pytest.fixture(scope="module")
def parsed(guarded: Any, backend: Backend) -> ParsedNetwork:
    return parse_network(backend, lower_graph(guarded.path, read_graph(guarded.path)))


def _edit(model: ir.Model) -> ir.Node:
    return next(n for n in model.graph if n.domain == "guardbake" and str(n.name).endswith("edit"))


def test_every_guard_node_became_layers(guarded: Any, parsed: ParsedNetwork) -> None:
    prove_in_graph(ir.load(guarded.path), guarded.nodes, where="test")
    found = prove_in_network(parsed.network, guarded.nodes, where="test")
    assert list(found) == list(guarded.nodes)
    assert len({layer for layers in found.values() for layer in layers}) == sum(
        len(layers) for layers in found.values()
    )


def test_a_name_that_is_only_a_prefix_does_not_count(guarded: Any, parsed: ParsedNetwork) -> None:
    for wrong in (guarded.nodes[-1][:-1], guarded.nodes[-1] + "2", ""):
        with pytest.raises(SiteError, match="no layer of"):
            prove_in_network(parsed.network, [wrong], where="test")


def test_a_guard_that_does_not_reach_the_output_is_refused(
    guarded: Any, parsed: ParsedNetwork
) -> None:
    with pytest.raises(SiteError, match="no path"):
        prove_in_network(parsed.network, guarded.nodes, where="test", output="present.0.key")


def test_a_guard_stripped_from_the_graph_is_refused(guarded: Any, backend: Backend) -> None:
    model = read_graph(guarded.path)
    edit = _edit(model)
    for use in list(edit.outputs[0].uses()):
        use.node.replace_input_with(use.idx, edit.inputs[0])
    with pytest.raises(SiteError, match="no path from"):
        prove_in_graph(model, guarded.nodes, where="test")
    network = parse_network(backend, lower_graph(guarded.path, model)).network
    with pytest.raises(SiteError, match="no path from the layers"):
        prove_in_network(network, guarded.nodes, where="test")
    model.graph.remove(edit, safe=True)
    with pytest.raises(SiteError, match="0 nodes named"):
        prove_in_graph(model, guarded.nodes, where="test")
    network = parse_network(backend, lower_graph(guarded.path, model)).network
    with pytest.raises(SiteError, match="no layer of"):
        prove_in_network(network, guarded.nodes, where="test")


def test_a_way_round_the_guard_is_refused(guarded: Any) -> None:
    model = read_graph(guarded.path)
    edit = _edit(model)
    users = list(edit.outputs[0].uses())
    around = ir.node("Add", [edit.inputs[0], edit.outputs[0]], name="around")
    model.graph.insert_after(edit, around)
    users[0].node.replace_input_with(users[0].idx, around.outputs[0])
    with pytest.raises(SiteError, match=r"'around' reading .*down_proj"):
        prove_in_graph(model, guarded.nodes, where="test")


def test_a_doubled_name_is_refused(guarded: Any) -> None:
    model = read_graph(guarded.path)
    other = next(node for node in model.graph if node.op_type == "Sigmoid")
    other.name = guarded.nodes[-1]
    with pytest.raises(SiteError, match="2 nodes named"):
        prove_in_graph(model, guarded.nodes, where="test")


def test_the_origins_of_a_layer_are_read_whole() -> None:
    assert origins("") == frozenset()
    assert origins("[ONNX Layer: a]") == {"a"}
    nested = "[ONNX Layer: sq | inner (F) | guardbake/x (G)]\x1e[ONNX Layer: b]"
    assert origins(nested) == {"sq", "inner", "guardbake/x", "b"}
