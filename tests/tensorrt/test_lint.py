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
from guardbake_tensorrt.lint import findings, findings_in_source, require_clean
from guardbake_tensorrt.lint_network import ignored_inputs
from guardbake_tensorrt.lower import lower_graph, read_graph
from guardbake_tensorrt.network import distinct, parse_network

_INFO = helper.make_tensor_value_info
_FLOAT, _HALF, _INT = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.INT64
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


def _attention(inputs: list[str], outputs: list[str], **attributes: Any) -> ir.Model:
    """Of half precision; a name says what it is. `wide`: a query of full precision."""
    kinds = {n: (_HALF, _HEADS) for n in ("q", "k", "v", "past_k", "past_v")}
    kinds |= {
        "wide": (_FLOAT, _HEADS),
        "mask": (TensorProto.BOOL, [1, 1, 4, 4]),
        "bias": (_FLOAT, [1, 1, 4, 4]),
        "lengths": (_INT, [1]),
    }
    used = {name: kinds[name] for name in inputs if name}
    node = helper.make_node("Attention", inputs, outputs, name="planted", **attributes)
    return _model(node, used, outputs)


def _operator(op_type: str, *kinds: int, shape: tuple[int, ...] = (2, 2), **how: Any) -> ir.Model:
    """One node on inputs of these dtypes. how: its domain and attributes."""
    inputs = {f"x{index}": (kind, list(shape)) for index, kind in enumerate(kinds)}
    return _model(
        helper.make_node(op_type, list(inputs), ["y"], name="planted", **how), inputs, ["y"]
    )


def _cache(mode: str = "linear", shape: tuple[int, ...] = (1, 2, 16, 8)) -> ir.Model:
    inputs = {
        "cache": (_HALF, list(shape)),
        "new": (_HALF, [*shape[:-2], 1, shape[-1]]),
        "where": (_INT, [1]),
    }
    node = helper.make_node("TensorScatter", list(inputs), ["y"], "planted", axis=-2, mode=mode)
    return _model(node, inputs, ["y"])


def _computed_cache() -> ir.Model:
    model = _cache()
    scatter = next(iter(model.graph))
    double = ir.node("Add", [scatter.inputs[0], scatter.inputs[0]], name="before")
    model.graph.insert_before(scatter, double)
    scatter.replace_input_with(0, double.outputs[0])
    return model


def _followed() -> ir.Model:
    """The dtypes of the two terms are in no value_info: one is a Cast's, the other a product's."""
    model = _operator("Add", _FLOAT, _FLOAT)
    add = next(iter(model.graph))
    left, right = add.inputs
    cast = ir.node("Cast", [left], attributes={"to": ir.DataType.FLOAT16}, name="cast")
    half = ir.node("Neg", [cast.outputs[0]], name="neg")
    product = ir.node("MatMul", [right, right], name="product")
    model.graph.insert_before(add, [cast, half, product])
    add.replace_input_with(0, half.outputs[0])
    add.replace_input_with(1, product.outputs[0])
    return model


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
    "scores out": (_attention(["q", "k", "v"], ["y", "", "", "qk"]), "more than one output"),
    "softcap": (_attention(["q", "k", "v"], ["y"], softcap=30.0), "softcap 30"),
    "mask and causal": (_attention(["q", "k", "v", "mask"], ["y"], is_causal=1), "together"),
    "softmax precision": (_attention(["q", "k", "v"], ["y"], softmax_precision=1), "precision"),
    "mask of another dtype": (_attention(["q", "k", "v", "bias"], ["y"]), "FLOAT on a query of"),
    "unmarked float32": (_attention(["wide", "wide", "wide"], ["y"]), "may not be decomposed"),
    "circular cache": (_cache("circular"), "mode 'circular'"),
    "3-D cache": (_cache(shape=(1, 16, 8)), "3 dimensions"),
    "computed cache": (_computed_cache(), "computed in the graph"),
    "gqa": (_operator("GroupQueryAttention", _FLOAT, domain="com.microsoft"), "own provider"),
    "nbits": (_operator("MatMulNBits", _FLOAT, domain="com.microsoft"), "own provider"),
    "fused": (_operator("FusedMatMul", _FLOAT, _FLOAT, domain="com.microsoft"), "own provider"),
    "no body": (_operator("Unheard", _FLOAT, domain="acme"), "no importer"),
    "taken for another": (_operator("Relu", _FLOAT, domain="acme"), "takes for the standard's"),
    "if": (_if(), "cannot gate the rows"),
    "scatter add": (_operator("ScatterND", _FLOAT, _INT, _FLOAT, reduction="add"), "'add'"),
    "scatter max": (_operator("ScatterElements", _FLOAT, _INT, _FLOAT, reduction="max"), "'max'"),
    "nonzero": (_operator("NonZero", _FLOAT), "NonZero"),
    "bool maximum": (_operator("ReduceMax", TensorProto.BOOL), "of bool"),
    "double": (_operator("Add", TensorProto.DOUBLE, TensorProto.DOUBLE), "DOUBLE"),
    "mixed sum": (_operator("Add", _HALF, _FLOAT), "FLOAT and FLOAT16"),
    "mixed product": (_operator("MatMul", TensorProto.BFLOAT16, _FLOAT), "BFLOAT16 and FLOAT"),
    "mixed join": (_operator("Concat", _HALF, _HALF, _FLOAT, axis=0), "FLOAT and FLOAT16"),
    "mixed choice": (_operator("Where", TensorProto.BOOL, _HALF, _FLOAT), "FLOAT and FLOAT16"),
    "mixed after a cast": (_followed(), "FLOAT and FLOAT16"),
    "standard name": (_function("Relu"), "replace by its own"),
    "TRT name": (_function("TRT_Guard"), "replace by its own"),
}

_HARMLESS = {
    "attention": _attention(["q", "k", "v"], ["y"]),
    "masked": _attention(["q", "k", "v", "mask"], ["y"]),
    "causal": _attention(["q", "k", "v"], ["y"], is_causal=1, softcap=0.0),
    "marked float32": _attention(["wide", "wide", "wide"], ["y"], TRT_decomposable=1),
    "cache": _cache(),
    "rotary": _operator("RotaryEmbedding", _FLOAT, _INT, _FLOAT, domain="com.microsoft"),
    "scatter": _operator("ScatterND", _FLOAT, _INT, _FLOAT, reduction="none"),
    "maximum": _operator("ReduceMax", _INT),
    "sum": _operator("Add", _HALF, _HALF),
    "norm": _operator("RMSNormalization", _HALF, _FLOAT),  # two dtypes, as its schema allows
    "function": _function("Harmless"),
}


@pytest.mark.parametrize("fault", sorted(_PLANTED))
def test_a_planted_fault_is_found_and_named(fault: str) -> None:
    model, reason = _PLANTED[fault]
    with pytest.raises(UnsupportedError, match=reason) as caught:
        require_clean(findings(model), Path("planted.onnx"))
    assert "planted" in caught.value.found or "acme::" in caught.value.found
    assert "more faults" not in caught.value.found
    assert caught.value.remedy


@pytest.mark.parametrize("graph", sorted(_HARMLESS))
def test_a_graph_without_a_fault_is_clean(graph: str) -> None:
    assert findings(_HARMLESS[graph]) == ()


def test_faults_are_counted_and_the_first_is_named() -> None:
    model = _operator("Unheard", _FLOAT, domain="acme")
    model.graph.append(ir.node("NonZero", [next(iter(model.graph)).outputs[0]], name="second"))
    with pytest.raises(UnsupportedError, match=r"'second': NonZero.*\(and 1 more faults\)"):
        require_clean(findings(model), Path("planted.onnx"))


def test_only_lowering_may_name_a_function_like_a_native_layer() -> None:
    model = _function("TRT_KVCacheUpdate")
    assert findings(model) == ()
    (fault,) = findings_in_source(model)
    assert "TensorRT's own layer" in fault.found
    assert findings_in_source(_function("Harmless")) == ()


def test_an_input_that_the_parser_drops_without_a_word_is_found(backend: Backend) -> None:
    """Behind the linter's back: with lengths that are computed, not even "Unused Input" is said."""
    model = _attention(["q", "k", "v", "", "", "", "lengths"], ["y"])
    attention = next(iter(model.graph))
    lengths = ir.node("Neg", [attention.inputs[6]], name="before")
    model.graph.insert_before(attention, lengths)
    attention.replace_input_with(6, lengths.outputs[0])
    lengths.outputs[0].name = "computed"
    network = backend.module.Builder(backend.logger).create_network(0)
    parser = backend.module.OnnxParser(network, backend.logger)
    assert parser.parse(ir.to_proto(model).SerializeToString())
    (fault,) = ignored_inputs(model, network)
    assert (fault.node, "'computed'" in fault.found) == ("planted", True)


@pytest.mark.parametrize("gate", ["always", "token", "sequence", "pooling", "each"])
def test_our_networks_use_every_input(gate: Any, make_guarded: Any, backend: Backend) -> None:
    path = make_guarded(gate, ("care", "project")).path
    lowered = lower_graph(path, read_graph(path))
    assert findings(lowered.model) == ()
    assert findings_in_source(read_graph(path)) == ()
    assert list(ignored_inputs(lowered.model, parse_network(backend, lowered).network)) == []


def test_a_fault_inside_a_function_is_found() -> None:
    assert [fault.node for fault in findings(_function("Harmless"))] == []
    model = _function("Harmless", inner="If")
    assert [fault.node for fault in findings(model)] == ["inner"]


def test_the_parser_knows_names_that_no_standard_has(backend: Backend) -> None:
    model = _function("SimplifiedLayerNormalization")
    assert findings(model) == ()
    with pytest.raises(UnsupportedError, match="replace by its own"):
        parse_network(backend, lower_graph(Path("planted.onnx"), model))


def test_a_parser_error_names_the_node(backend: Backend) -> None:
    model = _operator("BitShift", TensorProto.UINT8, TensorProto.UINT8, direction="LEFT")
    assert findings(model) == ()
    with pytest.raises(UnsupportedError, match=r"'planted' \(BitShift\)"):
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
    told = next(n for n in model.graph if n.domain == "guardbake" and "/tokens/" in str(n.name))
    state = next(i for i, v in enumerate(told.inputs) if v is not None and v.name == "guard_state")
    lost = ir.node("Shape", [told.inputs[state]], name="lost")
    zeros = ir.node("ReduceMax", [told.inputs[1], ir.val("axes1")], name="zeros")
    axes = ir.tensor([1], name="axes1", dtype=ir.DataType.INT64)
    zeros.inputs[1].const_value = axes  # type: ignore[union-attr]
    model.graph.register_initializer(zeros.inputs[1])  # type: ignore[arg-type]
    zeros.attributes["keepdims"] = ir.AttrInt64("keepdims", 0)
    model.graph.insert_before(told, [lost, zeros])
    told.replace_input_with(state, zeros.outputs[0])
    with pytest.raises(UnsupportedError, match="guard_state"):
        parse_network(backend, lower_graph(guarded.path, model))


def test_repeated_messages_are_told_once() -> None:
    again = "A node named x already exists, the output tensors of this new instance will not be"
    assert distinct(["a", "a ", again, again]) == (
        "a",
        "2 inner nodes share their name with those of another call",
    )
