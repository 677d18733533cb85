"""Graphs captured without weights: what they are, and that copying layers changes nothing."""

from __future__ import annotations

from typing import Any

import onnx
import onnx_ir as ir
import pytest
import torch
from transformers import AutoModelForImageTextToText, LlavaConfig

from guardbake.errors import UnsupportedError
from guardbake.vlm.catalog import family_of, models_root
from guardbake.vlm.hollow import hollow_from_config, hollow_model
from guardbake.vlm.load import read_config

from guardbake_onnx.capture import capture_decoder
from guardbake_onnx.parameters import Parameter, parameters_of
from guardbake_onnx.replicate import replicate, template_layers
from guardbake_onnx.vision import capture_vision

DEPTH = 24


def stored(model: ir.Model) -> bytes:
    return ir.to_proto(model).SerializeToString(deterministic=True)


def deep_llava() -> LlavaConfig:
    """24 layers of width 16, a tower of four layers of which the third is looked at."""
    config: Any = read_config(models_root() / "tiny-llava")
    text, vision = config.text_config, config.vision_config
    text.num_hidden_layers, text.hidden_size, text.intermediate_size = DEPTH, 16, 24
    text.num_attention_heads, text.num_key_value_heads, text.head_dim = 2, 1, 8
    vision.num_hidden_layers, config.vision_feature_layer = 4, -2
    return config  # type: ignore[no-any-return]


def test_copied_layers_are_what_a_trace_of_the_whole_model_gives() -> None:
    """At 24 layers, and the whole model with real weights: neither depth nor weights matter."""
    config: Any = deep_llava()
    family = family_of(config)
    maker: Any = AutoModelForImageTextToText
    real = maker.from_config(config, dtype=torch.float32, attn_implementation="sdpa").eval()
    hollow = hollow_from_config(config)
    copied = capture_decoder(hollow, family)
    same = stored(copied) == stored(capture_decoder(real, family, whole=True))
    assert same  # as a fact: to print how two megabytes differ takes minutes
    assert [node.op_type for node in copied.graph].count("Attention") == DEPTH


@pytest.mark.parametrize("name", ["tiny-llava", "tiny-qwen2_5_vl"])
def test_copied_layers_of_a_tower_are_what_a_trace_of_it_gives(name: str) -> None:
    """Qwen2.5-VL has two kinds of layers, and LLaVA leaves out the layers above the chosen one."""
    config: Any = deep_llava() if name == "tiny-llava" else read_config(models_root() / name)
    if name == "tiny-qwen2_5_vl":
        config.vision_config.depth, config.vision_config.fullatt_block_indexes = 5, [2, 4]
    family = family_of(config)
    copied = capture_vision(hollow_from_config(config), family)
    whole = capture_vision(hollow_from_config(config), family, whole=True)
    same = stored(copied) == stored(whole)
    assert same
    attention = [node.op_type for node in copied.graph].count("Attention")
    assert attention == (3 if name == "tiny-llava" else 5)


def test_a_captured_graph_is_onnx_and_names_its_parameters(exported: Any) -> None:
    names = {name for name, _ in exported.vlm.model.named_parameters(remove_duplicate=False)}
    for path in sorted(exported.captured.iterdir()):
        onnx.checker.check_model(path, full_check=True)
        found = parameters_of(ir.load(path).graph)
        assert found
        assert {parameter.name for _, parameter in found} <= names
    decoder = ir.load(exported.captured / "decoder.onnx").graph
    values = {value.name: parameter for value, parameter in parameters_of(decoder)}
    assert values["model.layers.3.mlp.up_proj.MatMul.weight"] == Parameter(
        "model.language_model.layers.3.mlp.up_proj.weight", transposed=True
    )
    assert values["model.norm.weight"] == Parameter("model.language_model.norm.weight", False)


def test_the_first_two_of_each_kind_are_traced() -> None:
    assert template_layers(["a"]) == [0]
    assert template_layers(["a", "a", "b", "a", "b", "b"]) == [0, 1, 2, 4]


def test_layers_that_hand_on_two_values_are_not_copied() -> None:
    x = ir.Value(name="x", shape=ir.Shape([1, 4]), type=ir.TensorType(ir.DataType.FLOAT))
    nodes = []
    for layer in range(2):
        before = nodes[-1].outputs[0] if nodes else x
        for _ in range(2):
            node = ir.node("Relu", [before])
            node.metadata_props["pkg.torch.onnx.name_scopes"] = str(["", f"layers.{layer}", "n"])
            nodes.append(node)
    tail = ir.node("Add", [nodes[2].outputs[0], nodes[3].outputs[0]])
    graph = ir.Graph([x], tail.outputs, nodes=[*nodes, tail], opset_imports={"": 23})
    with pytest.raises(UnsupportedError, match="2 values leaving it"):
        replicate(graph, "layers", ["a", "a", "a"])


def test_a_capture_needs_no_weights_and_leaves_the_model_as_it_was() -> None:
    """In half precision: parameters have no memory before and after, buffers are real."""
    model = hollow_model(models_root() / "tiny-llava", torch.float16)
    assert {buffer.device.type for buffer in model.buffers()} == {"cpu"}
    graph = capture_decoder(model, family_of(read_config(models_root() / "tiny-llava"))).graph
    assert {value.dtype for value, _ in parameters_of(graph)} == {ir.DataType.FLOAT16}
    assert graph.outputs[0].dtype == ir.DataType.FLOAT16
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert len(model.get_submodule("model.language_model.layers")) == 6  # type: ignore[arg-type]
    text = model.config.get_text_config()
    assert (text.num_hidden_layers, text._attn_implementation) == (6, "sdpa")
