"""Each family from checkpoint to guarded graph: features, logits, guard, prefill and eight steps.

The truth is transformers called directly for what is undefended, and the guarded reference in
PyTorch for what is guarded.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch

from guardbake.batch import Batch, alone
from guardbake.check.parity import Pair, compare
from guardbake.errors import UnsupportedError
from guardbake.passes.locate import locate
from guardbake.site import Site
from guardbake.spec import GuardSpec
from guardbake.vlm.hollow import hollow_model
from guardbake.vlm.layers import DecoderLayers
from guardbake.vlm.prompt import image_arguments, prepare
from guardbake.vlm.requests import collated
from guardbake.vlm.runner import Session, TorchRunner
from guardbake.vlm.tokens import Request

from guardbake_onnx.capture import capture_decoder
from guardbake_onnx.vision import capture_vision
from tests.families.conftest import noise
from tests.onnx.conftest import Exported, largest_difference
from tests.onnx.guarding import BUDGETS, between, guarded_runner
from tests.onnx.undefended import LOGITS, torch_trace

STEPS = 9  # the prefill's token and eight that are decoded
FEATURES = 1e-4  # fp32 on both sides, features up to 3; the largest difference seen was 4e-6


@pytest.mark.parametrize(
    ("member", "graph", "capture"),
    [
        ("gemma3", "decoder.onnx", capture_decoder),  # layers of two kinds
        ("instructblip", "vision.onnx", capture_vision),  # two stacks of them
    ],
    indirect=["member"],
)
def test_copied_layers_are_what_a_trace_of_all_gives(
    member: Exported, graph: str, capture: Callable[..., ir.Model], tmp_path: Path
) -> None:
    hollow = hollow_model(member.vlm.folder)
    ir.save(capture(hollow, member.vlm.family, whole=True), tmp_path / graph)
    same = (tmp_path / graph).read_bytes() == (member.captured / graph).read_bytes()
    assert same  # not the bytes, which pytest would explain at length


@pytest.mark.parametrize("sizes", [[(60, 100), (90, 40)], [(33, 33), (30, 120), (64, 64)]])
def test_image_features_equal_transformers(member: Exported, sizes: list[tuple[int, int]]) -> None:
    """Several images of several shapes, so of several grids and numbers of tiles."""
    vlm = member.vlm
    requests = [("open", noise(*size)) for size in sizes]
    batch = collated(vlm, requests)
    assert batch.pixel_values is not None
    model: Any = getattr(vlm.model, "model", vlm.model)
    arguments = image_arguments(vlm.family, batch, torch.from_numpy(batch.pixel_values))
    with torch.no_grad():
        expected = torch.cat(list(model.get_image_features(**arguments).pooler_output))
    seen = member.runner.features(batch)
    assert seen is not None
    assert len(seen) == batch.image_mask.sum()
    assert largest_difference(seen, expected.reshape(seen.shape).numpy()) <= FEATURES


def test_logits_equal_transformers_on_a_mixed_left_padded_batch(
    member: Exported, mixed: Batch
) -> None:
    forced = np.random.default_rng(3).integers(8, 40, (3, STEPS), dtype=np.int64)
    prefill, steps = torch_trace(member.vlm, mixed, forced)
    seen = member.runner.run(mixed, STEPS, forced)
    assert largest_difference(seen.prefill_logits[seen.valid], prefill[seen.valid]) <= LOGITS
    assert largest_difference(seen.step_logits, steps) <= LOGITS
    # the tolerance can tell: other rows' logits are further away than it by far
    assert largest_difference(seen.step_logits, np.roll(steps, 1, axis=0)) > 100 * LOGITS


def test_a_picture_changes_the_answer(member: Exported, mixed: Batch) -> None:
    """A planted fault: the wrong pictures, but for one row; that one does not notice."""
    assert mixed.pixel_values is not None
    right = member.runner.run(mixed, 1).step_logits
    pixels = 0.5 * mixed.pixel_values
    if mixed.image_mask[1].any():
        pixels[1] = mixed.pixel_values[1]  # its own, one tile a request
    wrong = dataclasses.replace(mixed, pixel_values=pixels)
    seen = member.runner.run(wrong, 1).step_logits
    assert largest_difference(seen[[0, 2]], right[[0, 2]]) > 10 * LOGITS
    assert largest_difference(seen[1], right[1]) <= LOGITS


def test_guarded_graph_equals_guarded_reference(
    member: Exported, mixed: Batch, guard: Callable[..., GuardSpec], tmp_path: Path
) -> None:
    """A gate that pools over image tokens opens for one request of the three."""
    spec = _pooling_guard(member, guard)
    scores = TorchRunner(member.vlm, spec).run(mixed, 1).guard_score
    assert scores is not None
    spec = between(spec, 0, scores[:, mixed.input_ids.shape[1] - 1, 0])
    words = np.random.default_rng(5).integers(8, 40, (3, STEPS), dtype=np.int64)
    greedy = TorchRunner(member.vlm, spec).run(mixed, STEPS)
    truth = TorchRunner(member.vlm, spec).run(mixed, STEPS, words)
    plain = TorchRunner(member.vlm, None).run(mixed, STEPS, words)
    tapped = guarded_runner(member.folder, spec, tmp_path / "tapped", True)
    shipped = guarded_runner(member.folder, spec, tmp_path / "shipped", False)
    said = tapped.run(mixed, greedy.tokens.shape[1], greedy.tokens)
    pairs = [
        Pair("greedy", greedy, said, shipped.run(mixed, STEPS), None),
        Pair("to the last step", truth, tapped.run(mixed, STEPS, words), None, plain),
        Pair("in chunks", truth, tapped.run(mixed, STEPS, words, chunk=7), None, None),
    ]
    report = compare(pairs, BUDGETS, gated=True)
    assert not [(c.quantity, c.worst, c.where) for c in report.comparisons if not c.passed]
    assert sum("FFN output" in c.quantity for c in report.comparisons) == len(spec.edits)
    assert truth.guard_state is not None
    assert sorted(truth.guard_state.tolist()) == [1, 1, 2]
    opened = truth.guard_state == 2
    changed = np.abs(truth.step_logits - plain.step_logits)[:, 1:]
    assert changed[opened].max() > 100 * LOGITS
    assert changed[~opened].max() == 0


def test_each_request_alone_equals_the_batch(
    member: Exported, mixed: Batch, asked: list[Request]
) -> None:
    together = member.runner.run(mixed, 1).step_logits
    for row, request in enumerate(asked):
        own = alone(mixed, row)
        seen = member.runner.run(own, 1).step_logits
        assert largest_difference(seen[0], together[row]) <= LOGITS
        again = collated(member.vlm, [request])
        for field in dataclasses.fields(Batch):
            a, b = getattr(own, field.name), getattr(again, field.name)
            assert (a is None) == (b is None), field.name
            assert a is None or np.array_equal(a, b), field.name


@torch.no_grad()
def test_layers_called_one_by_one_are_the_decoder(member: Exported, mixed: Batch) -> None:
    """What causal traces resume from; refused where layers do more than hand on to each other."""
    refused = {
        "gemma3": "sliding_attention",
        "paligemma": "see later ones",
        "qwen3_vl": "between layers",
    }
    if member.vlm.family.name in refused:
        with pytest.raises(UnsupportedError, match=refused[member.vlm.family.name]):
            DecoderLayers(member.vlm)
        return
    layers, prompt = DecoderLayers(member.vlm), prepare(member.vlm, alone(mixed, 0))
    length = prompt.mask.shape[1]
    visible = torch.ones(1, length, length, dtype=torch.bool).tril()
    setting = layers.setting(prompt.embeds, prompt.positions, visible)
    seen = layers.logits(layers.run(0, prompt.embeds, setting))
    session = Session(member.vlm, prompt, None)
    expected = session.logits(session.feed(length))
    assert largest_difference(seen.numpy(), expected.numpy()) <= LOGITS


def test_the_graphs_are_standard_onnx(member: Exported) -> None:
    for name in ("decoder", "embedding", "vision"):
        onnx.checker.check_model(member.folder / f"{name}.onnx", full_check=True)
        nodes = list(ir.load(member.folder / f"{name}.onnx").graph)
        assert {node.domain for node in nodes} == {""}
    decoder = ir.load(member.folder / "decoder.onnx").graph
    operators = [node.op_type for node in decoder]
    layers = member.runner.description.layers
    assert operators.count("Attention") == layers
    assert operators.count("RotaryEmbedding") == 2 * layers
    found = locate(decoder, [Site(layer, "ffn_output") for layer in range(layers)])
    assert {(site.how, site.confirmed) for site in found.values()} == {("our name", True)}


def _pooling_guard(member: Exported, guard: Callable[..., GuardSpec]) -> GuardSpec:
    description = member.runner.description
    return guard(
        "sequence",
        "care",
        pools=True,
        width=description.hidden,
        layers=description.layers,
        sensor=(Site(0, "residual"), Site(1, "residual")),
        edits=(2, 4),
        strength=2.0,
        threshold=0.0,
        gains=True,
        family=member.vlm.family.name,
    )
