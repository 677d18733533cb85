"""A site is found once, by one of three rules, or refused with what was found instead."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import pytest

from guardbake.errors import MalformedError, SiteError
from guardbake.passes.locate import SCOPES, locate
from guardbake.site import Site

FFN, RESIDUAL = Site(1, "ffn_output"), Site(1, "residual")


def find(toy: Any, site: Site) -> Any:
    return locate(toy.model.graph, [site])[site]


def refused(toy: Any, site: Site, *says: str) -> SiteError:
    with pytest.raises(SiteError) as caught:
        find(toy, site)
    for words in says:
        assert words in str(caught.value)
    return caught.value


def unknown(layer: int) -> str:
    return f"node_{layer}"


def test_our_own_name(lab: Any) -> None:
    toy = lab.toy()
    for layer in range(lab.layers):
        found = find(toy, Site(layer, "ffn_output"))
        assert found.how == "our name"
        assert found.value is toy.value(layer)


@pytest.mark.parametrize(
    "name",
    [
        "/model/model/layers.{}/mlp/down_proj/MatMul_quant",
        "/language_model/layers.{}/mlp/down_proj/MatMul",
        "/lm/layers.{}/mlp/sub/down_proj/MatMul",
        "model/layers.{}/feed_forward/w2/Gemm",
        "/transformer/layers.{}/mlp/fc2/MatMul",
        "/h/layers.{}/mlp/c_proj/MatMul",
    ],
)
def test_names_of_other_exporters(lab: Any, name: str) -> None:
    toy = lab.toy(lambda layer: name.format(layer))
    found = find(toy, FFN)
    assert found.how == "known name"
    assert found.value.producer().name == name.format(1)


def test_layer_1_is_not_layer_11(lab: Any) -> None:
    toy = lab.toy(lambda layer: f"/lm/layers.{layer * 10 + 1}/mlp/down_proj/MatMul")
    assert find(toy, Site(11, "ffn_output")).value.producer().name.startswith("/lm/layers.11/")
    assert find(toy, FFN).value.producer().name.startswith("/lm/layers.1/")
    refused(toy, Site(0, "ffn_output"))


def test_scopes_of_the_torch_exporter(lab: Any) -> None:
    toy = lab.toy(unknown, scopes=True)
    found = find(toy, FFN)
    assert found.how == "torch scope"
    assert found.value is toy.node("node_1").outputs[0]


def test_scopes_of_the_vision_tower_do_not_count(lab: Any) -> None:
    toy = lab.toy(unknown, scopes=True)
    toy.node("node_0").metadata_props[SCOPES] = "['model.vision_tower.layers.1.mlp']"
    assert find(toy, FFN).value is toy.node("node_1").outputs[0]


def test_a_scope_that_is_no_list_is_malformed(lab: Any) -> None:
    toy = lab.toy(unknown, scopes=True)
    toy.node("node_0").metadata_props[SCOPES] = "__import__('os')["
    with pytest.raises(MalformedError, match="node_0"):
        find(toy, FFN)


@pytest.mark.parametrize(
    "name",
    ["/model/layers.{}/mlp/down_proj/MatMul", "/lm/layers.{}/mlp/down_proj/MatMul"],
)
def test_with_a_bias_the_site_is_the_sum(lab: Any, guard: Any, name: str) -> None:
    """The PyTorch module's output includes its bias; the product alone is another tensor."""
    toy = lab.toy(lambda layer: name.format(layer), bias=True)
    assert find(toy, FFN).value.producer().name == name.format(1).replace("MatMul", "Add")
    assert find(toy, RESIDUAL).value is toy.node("residual_1").outputs[0]


def test_a_bias_under_any_name(lab: Any) -> None:
    toy = lab.toy(bias=True)
    add = toy.node("/model/layers.1/mlp/down_proj/Add")
    add.name, add.outputs[0].name = "bias_1", "biased_1"
    assert find(toy, FFN).value is add.outputs[0]


def test_the_residual_is_what_comes_after_the_add(lab: Any) -> None:
    toy = lab.toy()
    assert find(toy, RESIDUAL).value is toy.node("residual_1").outputs[0]


@pytest.mark.parametrize("op", ["SkipSimplifiedLayerNormalization", "SkipLayerNormalization"])
def test_the_residual_of_a_fused_norm_is_its_fourth_output(lab: Any, op: str) -> None:
    toy = lab.toy()
    add = toy.node("residual_1")
    fused = ir.node(op, add.inputs, domain="com.microsoft", num_outputs=4, name="fused")
    toy.model.graph.insert_before(add, fused)
    add.outputs[0].replace_all_uses_with(fused.outputs[3])
    toy.model.graph.remove(add, safe=True)
    assert find(toy, RESIDUAL).value is fused.outputs[3]


def test_a_residual_behind_two_readers_is_refused(lab: Any) -> None:
    toy = lab.toy()
    y = toy.value(1)
    toy.model.graph.append(ir.node("Relu", [y], name="second reader"))
    refused(toy, RESIDUAL, "2 readers", str(y.name))
    assert find(toy, FFN).value is y  # the FFN output itself is still one tensor


def test_a_residual_that_is_no_add_is_refused(lab: Any) -> None:
    toy = lab.toy()
    add = toy.node("residual_1")
    product = ir.node("Mul", add.inputs, name="product")
    toy.model.graph.insert_before(add, product)
    add.outputs[0].replace_all_uses_with(product.outputs[0])
    toy.model.graph.remove(add, safe=True)
    refused(toy, RESIDUAL, "feeds Mul product")


def test_no_match_names_the_near_misses(lab: Any) -> None:
    error = refused(lab.toy(), Site(7, "ffn_output"), "layers.7.ffn_output", "near misses")
    assert "/model/layers.0/mlp/down_proj/MatMul/output_0" in error.found
    assert "none" in refused(lab.toy(unknown), FFN).found


def test_two_matches_are_refused_by_name(lab: Any) -> None:
    toy = lab.toy(lambda layer: f"/{'ab'[layer % 2]}/layers.1/mlp/down_proj/MatMul_{layer}")
    refused(toy, FFN, "3 matches", "/a/layers.1/mlp/down_proj/MatMul_0/output_0")


def test_two_scope_matches_are_named_in_graph_order(lab: Any) -> None:
    toy = lab.toy(unknown, scopes=True)
    toy.node("node_0").metadata_props[SCOPES] = "['model.layers.1.mlp']"
    refused(toy, FFN, "2 matches by torch scope: node_0/output_0, node_1/output_0")


def test_the_graph_is_left_as_it_was(lab: Any) -> None:
    toy = lab.toy()
    before = ir.to_proto(toy.model).SerializeToString(deterministic=True)
    find(toy, FFN)
    find(toy, RESIDUAL)
    assert ir.to_proto(toy.model).SerializeToString(deterministic=True) == before
