"""Each rule is red on a planted fault, and all are green on the graphs we write."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from guardbake.errors import UnsupportedError

from guardbake_tensorrt import Backend
from guardbake_tensorrt.lint import findings, require_clean
from guardbake_tensorrt.lower import lower_graph, read_graph
from guardbake_tensorrt.network import distinct, parse_network

_INFO = helper.make_tensor_value_info
_HEADS = [1, 2, 4, 8]


def _model(
    node: onnx.NodeProto,
    inputs: Mapping[str, tuple[int, list[int]]],
    outputs: list[str],
    functions: tuple[onnx.FunctionProto, ...] = (),
) -> ir.Model:
    graph = helper.make_graph(
        [node],
        "planted",
        [_INFO(name, kind, shape) for name, (kind, shape) in inputs.items()],
        [_INFO(name, TensorProto.FLOAT, None) for name in outputs],
    )
    opsets = [helper.make_opsetid("", 24)]
    opsets += [helper.make_opsetid(d, 1) for d in {node.domain} - {""}]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=11, functions=functions)
    return ir.from_proto(model)


def _attention(inputs: list[str], outputs: list[str]) -> ir.Model:
    kinds = {n: (TensorProto.FLOAT, _HEADS) for n in ("q", "k", "v", "past_k", "past_v")}
    kinds["lengths"] = (TensorProto.INT64, [1])
    used = {name: kinds[name] for name in inputs if name}
    return _model(helper.make_node("Attention", inputs, outputs, name="planted"), used, outputs)


def _vendor(op_type: str) -> ir.Model:
    node = helper.make_node(op_type, ["x"], ["y"], name="planted", domain="com.microsoft")
    return _model(node, {"x": (TensorProto.FLOAT, [2])}, ["y"])


def _if() -> ir.Model:
    def branch(op_type: str, name: str) -> onnx.GraphProto:
        inner = helper.make_node(op_type, ["x", "x"], [name])
        return helper.make_graph([inner], name, [], [_INFO(name, TensorProto.FLOAT, [2])])

    node = helper.make_node(
        "If", ["c"], ["y"], name="planted", then_branch=branch("Add", "t"),
        else_branch=branch("Mul", "e"),
    )  # fmt: skip
    inputs = {"c": (TensorProto.BOOL, []), "x": (TensorProto.FLOAT, [2])}
    return _model(node, inputs, ["y"])


def _function(name: str, inner: str = "Mul") -> ir.Model:
    body = [helper.make_node(inner, ["a", "a"], ["b"], name="inner")]
    function = helper.make_function("acme", name, ["a"], ["b"], body, [helper.make_opsetid("", 24)])
    node = helper.make_node(name, ["x"], ["y"], name="planted", domain="acme")
    return _model(node, {"x": (TensorProto.FLOAT, [2])}, ["y"], (function,))


_PLANTED = {
    "nonpad": (_attention(["q", "k", "v", "", "", "", "lengths"], ["y"]), "nonpad_kv_seqlen"),
    "past": (_attention(["q", "k", "v", "", "past_k", "past_v"], ["y", "k2", "v2"]), "cache"),
    "present": (_attention(["q", "k", "v"], ["y", "k2", "v2"]), "cache"),
    "gqa": (_vendor("GroupQueryAttention"), "onnxruntime's own"),
    "nbits": (_vendor("MatMulNBits"), "onnxruntime's own"),
    "if": (_if(), "cannot gate the rows"),
    "standard name": (_function("Relu"), "replace by its own"),
    "TRT name": (_function("TRT_Guard"), "replace by its own"),
}


@pytest.mark.parametrize("fault", sorted(_PLANTED))
def test_a_planted_fault_is_found_and_named(fault: str) -> None:
    model, reason = _PLANTED[fault]
    with pytest.raises(UnsupportedError, match=reason) as caught:
        require_clean(findings(model), Path("planted.onnx"))
    assert "planted" in caught.value.found or "acme::" in caught.value.found
    assert caught.value.remedy


def test_a_fault_inside_a_function_is_found() -> None:
    assert [fault.node for fault in findings(_function("Harmless"))] == []
    model = _function("Harmless", inner="If")
    assert [fault.node for fault in findings(model)] == ["inner"]


def test_the_parser_knows_names_that_no_standard_has(backend: Backend) -> None:
    model = _function("SimplifiedLayerNormalization")
    assert findings(model) == ()
    with pytest.raises(UnsupportedError, match="replace by its own"):
        parse_network(backend, lower_graph(Path("planted.onnx"), model))


@pytest.mark.parametrize("gate", ["always", "token", "sequence"])
def test_our_graphs_are_clean(gate: Any, make_guarded: Any, backend: Backend) -> None:
    guarded = make_guarded(gate, ("care", "project"))
    assert findings(read_graph(guarded.path)) == ()


def test_a_parser_error_names_the_node(backend: Backend) -> None:
    model = _model(
        helper.make_node("Unheard", ["x"], ["y"], name="planted", domain="acme"),
        {"x": (TensorProto.FLOAT, [2])},
        ["y"],
    )
    with pytest.raises(UnsupportedError, match=r"'planted' \(Unheard\)"):
        parse_network(backend, lower_graph(Path("planted.onnx"), model))


def test_an_input_reported_as_unused_is_refused(
    guarded: Any, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = backend.log.drain
    said = (("WARNING", "importer.cpp:1: Unused Input: lengths"),)
    monkeypatch.setattr(type(backend.log), "drain", lambda _: taken() + said)
    with pytest.raises(UnsupportedError, match="Unused Input: lengths"):
        parse_network(backend, lower_graph(guarded.path, read_graph(guarded.path)))


def test_a_graph_input_that_leads_nowhere_is_refused(guarded: Any, backend: Backend) -> None:
    model = read_graph(guarded.path)
    gate = next(n for n in model.graph if n.domain == "guardbake" and "/gate.0/" in str(n.name))
    state = next(i for i, v in enumerate(gate.inputs) if v is not None and v.name == "guard_state")
    lost = ir.node("Shape", [gate.inputs[state]], name="lost")
    zeros = ir.node("ReduceMax", [gate.inputs[1], ir.val("axes1")], name="zeros")
    axes = ir.tensor([1], name="axes1", dtype=ir.DataType.INT64)
    zeros.inputs[1].const_value = axes  # type: ignore[union-attr]
    model.graph.register_initializer(zeros.inputs[1])  # type: ignore[arg-type]
    zeros.attributes["keepdims"] = ir.AttrInt64("keepdims", 0)
    model.graph.insert_before(gate, [lost, zeros])
    gate.replace_input_with(state, zeros.outputs[0])
    with pytest.raises(UnsupportedError, match="guard_state"):
        parse_network(backend, lower_graph(guarded.path, model))


def test_repeated_messages_are_told_once() -> None:
    again = "A node named x already exists, the output tensors of this new instance will not be"
    assert distinct(["a", "a ", again, again]) == (
        "a",
        "2 inner nodes share their name with those of another call",
    )
