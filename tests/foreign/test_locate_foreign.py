"""Every site of every exporter's graph, by the rule that should find it and by the stream."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest

from guardbake.errors import SiteError
from guardbake.passes.locate import SCOPES, locate
from guardbake.passes.locate_stream import read_stream
from guardbake.site import Site

GraphOf = Callable[[str], Path]
OURS, GENAI_SUM = "/model/layers.{}/mlp/down_proj/MatMul/output_0", "/model/layers.1/input_layer"
# folder -> rule, FFN outputs of layers 0 and 1, the residual of layer 0
EXPECTED = {
    "genai-fp32": ("our name", OURS.format(0), OURS.format(1), f"{GENAI_SUM}norm/output_3"),
    "genai-fp16": ("our name", OURS.format(0), OURS.format(1), f"{GENAI_SUM}norm/output_3"),
    "genai-int8": ("our name", OURS.format(0), OURS.format(1), f"{GENAI_SUM}norm/output_3"),
    "genai-int4": ("our name", OURS.format(0), OURS.format(1), f"{GENAI_SUM}norm/output_3"),
    "mobius": (
        "known name",
        "v_model.layers.0.mlp.down_proj.MatMul_33",
        "v_model.layers.1.mlp.down_proj.MatMul_57",
        "val_5",
    ),
    "mobius-gqa": (
        "known name",
        "v_model.layers.0.mlp.down_proj.MatMul_30",
        "v_model.layers.1.mlp.down_proj.MatMul_52",
        "val_8",
    ),
    "optimum": (
        "known name",
        "/model/layers.0/mlp/down_proj/MatMul_output_0",
        "/model/layers.1/mlp/down_proj/MatMul_output_0",
        "/model/layers.0/Add_1_output_0",
    ),
    "onnxruntime-saved": ("residual stream", "linear_6", "linear_13", "add_409"),
    "edgellm": ("torch scope", "linear_4", "linear_9", "add_121"),
}
FIRST, SECOND, SUM = Site(0, "ffn_output"), Site(1, "ffn_output"), Site(0, "residual")


@pytest.mark.parametrize("name", EXPECTED)
def test_every_exporter_is_read_twice_over(graph_of: GraphOf, name: str) -> None:
    """By name or scope, and by the residual stream, which knows no names: the same values."""
    graph = ir.load(graph_of(name)).graph
    how, *values = EXPECTED[name]
    found = locate(graph, [FIRST, SECOND, SUM])
    assert [found[site].value.name for site in (FIRST, SECOND, SUM)] == values
    assert {each.how for each in found.values()} == {how}
    assert all(each.confirmed for each in found.values())
    assert [value.name for value in read_stream(graph).ffn_outputs] == values[:2]


@pytest.mark.parametrize("branch", ["then_branch", "else_branch"])
def test_both_branches_of_a_merged_decoder_are_decoders(graph_of: GraphOf, branch: str) -> None:
    (whole,) = ir.load(graph_of("optimum-merged")).graph
    found = locate(whole.attributes[branch].as_graph(), [FIRST, SUM])
    names = [found[site].value.name for site in (FIRST, SUM)]
    assert names == [EXPECTED["optimum"][1], EXPECTED["optimum"][3]]


def nameless(path: Path) -> ir.Model:
    """The same graph with every name and note gone."""
    model = ir.load(path)
    for index, node in enumerate(model.graph):
        node.name = f"n{index}"
        node.metadata_props.clear()
        for position, value in enumerate(node.outputs):
            if value.name and not any(value is out for out in model.graph.outputs):
                value.name = f"n{index}_{position}"
    return model


@pytest.mark.parametrize("name", EXPECTED)
def test_without_names_the_stream_finds_the_same_nodes(graph_of: GraphOf, name: str) -> None:
    named, bare = ir.load(graph_of(name)).graph, nameless(graph_of(name)).graph
    for site in (FIRST, SECOND, SUM):
        want, got = locate(named, [site])[site], locate(bare, [site])[site]
        places = [list(g).index(f.value.producer()) for g, f in ((named, want), (bare, got))]
        assert places[0] == places[1]
        assert got.how == "residual stream"
        assert [miss.how for miss in got.missed] == ["our name", "known name", "torch scope"]


def rename(graph: ir.Graph, old: str, new: str) -> ir.Value:
    value = next(v for node in graph for v in node.outputs if v.name == old)
    value.name = new
    return value


def refused(graph: ir.Graph, site: Site, *says: str) -> None:
    with pytest.raises(SiteError) as caught:
        locate(graph, [site])
    assert caught.value.exit_code == 3
    for words in says:
        assert words in caught.value.found


def test_a_name_that_lies_is_refused_with_both_candidates(graph_of: GraphOf) -> None:
    graph = ir.load(graph_of("genai-fp32")).graph
    rename(graph, OURS.format(0), "elsewhere")
    rename(graph, "/model/layers.0/attn/o_proj/MatMul/output_0", OURS.format(0))
    refused(graph, FIRST, f"{OURS.format(0)} by our name, but elsewhere by the residual stream")


def test_layers_counted_from_another_number_are_refused(graph_of: GraphOf) -> None:
    """The second layer called layers.2: whoever asks for layer 1 must not get nothing or it."""
    graph = ir.load(graph_of("genai-fp32")).graph
    moved = OURS.format(1), OURS.format(2)
    rename(graph, *moved)
    next(n for n in graph if n.outputs[0].name == moved[1]).name = "down"
    refused(graph, Site(2, "ffn_output"), "by our name, but the residual stream has 2 layers only")
    assert locate(graph, [SECOND])[SECOND].how == "residual stream"


def test_the_last_sum_that_a_fused_norm_keeps_to_itself(graph_of: GraphOf) -> None:
    graph = ir.load(graph_of("genai-int4")).graph
    refused(graph, Site(1, "residual"), "final_norm_layernorm", "keeps the sum")


def test_a_bias_inside_the_fused_norm_leaves_no_ffn_output(graph_of: GraphOf) -> None:
    """onnxruntime may move the projection's bias there: what is left is not the FFN's output."""
    graph = nameless(graph_of("genai-fp32")).graph
    norm = [n for n in graph if n.op_type.startswith("Skip")][1]
    norm.resize_inputs(4)
    norm.replace_input_with(3, norm.inputs[2])
    refused(graph, FIRST, "layer 0", "adds the FFN's bias")


def test_where_a_norm_follows_the_ffn_the_site_lies_behind_it(graph_of: GraphOf) -> None:
    """Gemma normalises what its FFN gives before the add; the site is what is added."""
    path = graph_of("genai-fp32")
    for model, how in ((ir.load(path), "our name"), (nameless(path), "residual stream")):
        graph = model.graph
        for skip in [n for n in graph if n.op_type.startswith("Skip")]:
            branch = skip.inputs[1]
            assert branch is not None
            norm = ir.node("SimplifiedLayerNormalization", [branch, skip.inputs[2]], name="post")
            graph.insert_before(skip, norm)
            skip.replace_input_with(1, norm.outputs[0])
        found = locate(graph, [FIRST])[FIRST]
        assert (found.how, found.confirmed) == (how, True)
        node = found.value.producer()
        assert node is not None
        assert node.name == "post"


def test_a_norm_in_pieces_behind_the_ffn_is_refused(graph_of: GraphOf) -> None:
    """It is not seen through: a guard before it would edit another tensor."""
    graph = ir.load(graph_of("genai-fp32")).graph
    for skip in [n for n in graph if n.op_type.startswith("Skip")]:
        square = ir.node("Mul", [skip.inputs[1], skip.inputs[1]], name="post")
        graph.insert_before(skip, square)
        skip.replace_input_with(1, square.outputs[0])
    refused(graph, SUM, "readers of the FFN output")


def test_a_stream_of_another_shape_is_not_guessed_at(graph_of: GraphOf) -> None:
    graph = nameless(graph_of("onnxruntime-saved")).graph
    next(n for n in graph if n.op_type == "Softmax").op_type = "Relu"
    assert not read_stream(graph).ffn_outputs
    refused(graph, FIRST, "residual add 0, is not what attention adds")


def test_a_broken_note_is_malformed_and_not_evaluated(graph_of: GraphOf) -> None:
    graph: Any = ir.load(graph_of("edgellm")).graph
    next(iter(graph)).metadata_props[SCOPES] = "[__import__('os').getcwd()]"
    with pytest.raises(Exception, match="a list of module names") as caught:
        locate(graph, [FIRST])
    assert caught.value.exit_code == 9  # type: ignore[attr-defined]
