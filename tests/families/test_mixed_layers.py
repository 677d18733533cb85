"""Gemma 3: sliding and full layers, images that see themselves whole, a norm behind the FFN."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from guardbake.batch import Batch, prefill_stops
from guardbake.passes.locate import locate
from guardbake.site import Site
from guardbake.vlm.hollow import hollow_model

from guardbake_onnx.replicate import only_layers
from guardbake_onnx.runner import OnnxRunner
from tests.onnx.conftest import Exported, largest_difference
from tests.onnx.undefended import LOGITS

NORM = "/model/layers.2/post_feedforward_layernorm/RMSNormalization"
pytestmark = pytest.mark.parametrize("member", ["gemma3"], indirect=True)


def test_chosen_layers_count_themselves(member: Exported) -> None:
    """A layer finds its cache by its number, and its mask by its kind."""
    decoder: Any = hollow_model(member.vlm.folder).get_submodule("model.language_model")
    kinds = decoder.config.layer_types
    with only_layers(decoder, "layers", [1, 3]):
        assert [layer.self_attn.layer_idx for layer in decoder.layers] == [0, 1]
        assert decoder.config.layer_types == ["sliding_attention", "full_attention"]
    assert [layer.self_attn.layer_idx for layer in decoder.layers] == [0, 1, 2, 3, 4]
    assert decoder.config.layer_types == kinds


def test_the_site_lies_behind_the_norm(member: Exported) -> None:
    graph = ir.load(member.folder / "decoder.onnx").graph
    found = locate(graph, [Site(2, "ffn_output")])[Site(2, "ffn_output")]
    assert found.confirmed
    assert found.value.name == f"{NORM}/output_0"


def test_an_image_is_in_the_mask(member: Exported, mixed: Batch) -> None:
    """A planted fault: the decoder is not told of the image."""
    right = member.runner.run(mixed, 1).step_logits
    graph_alone = dataclasses.replace(mixed, image_mask=np.zeros_like(mixed.image_mask))
    seen = member.runner.run(graph_alone, 1).step_logits
    assert largest_difference(seen[[0, 2]], right[[0, 2]]) > 10 * LOGITS
    assert largest_difference(seen[1], right[1]) <= LOGITS


def test_the_window_is_in_the_mask(member: Exported, mixed: Batch, tmp_path: Path) -> None:
    """A planted fault: layers that should slide see everything."""
    for path in member.folder.iterdir():
        shutil.copyfile(path, tmp_path / path.name)
    model = ir.load(member.folder / "decoder.onnx")
    constants = model.graph.initializers.values()
    windows = [v for v in constants if v.const_value is not None and _is(v.const_value, 7)]
    assert len(windows) == 1
    windows[0].const_value = ir.tensor(np.full_like(windows[0].const_value.numpy(), 700))
    ir.save(model, tmp_path / "decoder.onnx")
    wide = OnnxRunner(tmp_path, threads=1).run(mixed, 1).step_logits
    assert largest_difference(wide, member.runner.run(mixed, 1).step_logits) > 10 * LOGITS


def _is(tensor: ir.TensorProtocol, number: int) -> bool:
    return (
        tensor.size == 1 and tensor.dtype == ir.DataType.INT64 and tensor.numpy().item() == number
    )


def test_no_piece_of_a_prefill_ends_within_an_image(member: Exported, mixed: Batch) -> None:
    pieces = prefill_stops(mixed, 2, "image")
    assert pieces[-1] == mixed.input_ids.shape[1]
    for stop in pieces[:-1]:
        assert not (mixed.image_mask[:, stop - 1] & mixed.image_mask[:, stop]).any()
    assert prefill_stops(mixed, 2, "causal") == [*range(2, pieces[-1], 2), pieces[-1]]
    whole = member.runner.run(mixed, 2)
    cut = member.runner.run(mixed, 2, whole.tokens, chunk=2)
    assert largest_difference(cut.step_logits, whole.step_logits) <= LOGITS
