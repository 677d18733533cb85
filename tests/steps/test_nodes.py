"""Level A: the guard's nodes alone, on vectors of random numbers, and faults in them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from guardbake.batch import Batch
from guardbake.check.comparison import Budget, Budgets, Comparison
from guardbake.check.golden_vectors import IMAGES, WORDS, GoldenVectors, golden_vectors
from guardbake.passes.extract import ExtractGuard
from guardbake.passes.functions import DOMAIN
from guardbake.passes.insert import InsertGuard
from guardbake.plugins import Trace, find_session
from guardbake.site import Site
from guardbake.spec import GuardSpec
from guardbake.steps.nodes import hold_nodes

WIDTH, LAYERS, ROWS, PROMPT, STEPS = 16, 3, 2, 12, 4
SITES = (Site(0, "residual"), Site(1, "residual"))
BUDGETS = Budgets(*(Budget(1e-4, "a test's own"),) * 4, law=Budget(1.0, "a test's own"))
Spec = Callable[..., GuardSpec]


def decoder() -> ir.Model:
    """Three residual layers of one matrix each; nothing of it but the guard is ever run."""
    shape = ["batch", "sequence", WIDTH]
    x = ir.val("inputs_embeds", ir.DataType.FLOAT, shape)
    inputs = [x, ir.val("attention_mask", ir.DataType.INT64, ["batch", "total"])]
    weight = ir.val("w", const_value=ir.tensor(np.ones((WIDTH, WIDTH), np.float32), name="w"))
    nodes: list[ir.Node] = []
    for layer in range(LAYERS):
        product = ir.node("MatMul", [x, weight], name=Site(layer, "ffn_output").onnx_value)
        total = ir.node("Add", [x, product.outputs[0]], name=f"/model/layers.{layer}/residual")
        for node in (product, total):
            node.outputs[0].name = str(node.name)
            node.outputs[0].dtype, node.outputs[0].shape = ir.DataType.FLOAT, ir.Shape(shape)
        nodes += [product, total]
        x = total.outputs[0]
    x.name = "logits"
    graph = ir.Graph(
        inputs, [x], nodes=nodes, initializers=[weight], opset_imports={"": 23}, name="decoder"
    )
    return ir.Model(graph, ir_version=10)


def vectors(spec: GuardSpec) -> GoldenVectors:
    """Of two requests, one with an image and one shorter than what is kept."""
    rng = np.random.default_rng(5)
    mask = np.ones((ROWS, PROMPT), np.int64)
    mask[1, :-6] = 0
    images = np.zeros((ROWS, PROMPT), bool)
    images[0, 2:7] = True
    ids = np.ones_like(mask)
    shape = (ROWS, PROMPT + STEPS - 1, WIDTH)
    taps = {f"reached/{site}": rng.standard_normal(shape) for site in sites(spec)}
    logits = np.zeros((ROWS, STEPS, 3), np.float32)
    trace = Trace(
        tokens=np.ones((ROWS, STEPS), np.int64),
        prefill_logits=logits,
        step_logits=logits,
        lengths=np.full(ROWS, STEPS),
        valid=mask == 1,
        guard_score=None,
        guard_open=None,
        guard_state=None,
        taps=taps,
    )
    return golden_vectors(spec, Batch(ids, mask, images, None, None), trace)


def sites(spec: GuardSpec) -> set[Site]:
    read = {site for sensor in spec.sensors for site in sensor.sites}
    return read | {edit.site for edit in spec.edits}


def held(
    spec: GuardSpec, found: GoldenVectors, folder: Path, plant: Callable[[ir.Model], None]
) -> list[Comparison]:
    model = decoder()
    InsertGuard(spec)(model)
    plant(model)
    ir.save(model, folder / "decoder.onnx")
    return hold_nodes(folder / "decoder.onnx", spec, found, find_session("onnx"), BUDGETS)


def nothing(_model: ir.Model) -> None:
    """The graph stays as it is."""


CASES = [
    ("always", "care", {}),
    ("token", "add", {}),
    ("sequence", "care", {"sensor": SITES, "pools": True}),
    ("sequence", "replace", {}),
    ("sequence", "astra", {"later": (SITES[1],), "edits": (1, 2)}),
]


@pytest.mark.parametrize(("profile", "kind", "more"), CASES)
def test_every_kind_of_guard_is_as_the_law_says(
    guard: Spec, tmp_path: Path, profile: str, kind: str, more: dict[str, object]
) -> None:
    spec = guard(profile, kind, threshold=-9.0, width=WIDTH, layers=LAYERS, **more)
    found = held(spec, vectors(spec), tmp_path, nothing)
    assert [each.quantity for each in found if not each.passed] == []
    assert sum("while open" in each.quantity for each in found) == len(spec.edits)
    assert ("recorded scores" in [each.quantity for each in found]) == bool(spec.sensors)


def scaled(name: str, factor: float) -> Callable[[ir.Model], None]:
    def plant(model: ir.Model) -> None:
        for value in model.graph.initializers.values():
            if str(value.name).endswith(name):
                assert value.const_value is not None
                array = value.const_value.numpy() * np.float32(factor)
                value.const_value = ir.tensor(array, name=value.name)

    return plant


@pytest.mark.parametrize(
    ("name", "gates"), [("/basis", {"law"}), ("/directions", {"law", "canary"})]
)
def test_a_node_that_computes_something_else_is_seen(
    guard: Spec, tmp_path: Path, name: str, gates: set[str]
) -> None:
    spec = guard("sequence", "care", threshold=-9.0, width=WIDTH, layers=LAYERS)
    found = held(spec, vectors(spec), tmp_path, scaled(name, 1.001))
    assert {each.gate for each in found if not each.passed} == gates


def strip(model: ir.Model) -> None:
    """The edit is gone; what it fed is fed the FFN output."""
    edit = next(node for node in model.graph if str(node.name).endswith("/edit"))
    edit.outputs[0].replace_all_uses_with(edit.inputs[0])
    model.graph.remove(edit)


def strip_all(model: ir.Model) -> None:
    """As if no guard had ever been inserted."""
    model.graph = decoder().graph


@pytest.mark.parametrize(("plant", "missing"), [(strip, 2), (strip_all, 6)])
def test_a_graph_without_the_guard_s_nodes_fails(
    guard: Spec, tmp_path: Path, plant: Callable[[ir.Model], None], missing: int
) -> None:
    spec = guard("sequence", "care", width=WIDTH, layers=LAYERS)
    (found,) = held(spec, vectors(spec), tmp_path, plant)
    assert (found.gate, found.worst, found.passed) == ("law", missing, False)


def test_other_scores_on_record_are_the_canary_s(guard: Spec, tmp_path: Path) -> None:
    spec = guard("token", "add", width=WIDTH, layers=LAYERS)
    sound = vectors(spec)
    assert sound.scores is not None
    found = held(spec, replace(sound, scores=sound.scores + 1), tmp_path, nothing)
    assert [each.gate for each in found if not each.passed] == ["canary"]


def test_vectors_are_of_images_of_words_and_of_new_tokens(guard: Spec) -> None:
    found = vectors(guard("token", "add", width=WIDTH, layers=LAYERS))
    assert found.mask.shape == (ROWS, IMAGES + WORDS + STEPS - 1)
    assert found.image_mask.sum(axis=1).tolist() == [IMAGES, 0]
    assert found.mask.sum(axis=1).tolist() == [IMAGES + WORDS + 3, 6 + 3]


def test_only_the_guard_is_taken_out(guard: Spec) -> None:
    spec = guard("sequence", "care", width=WIDTH, layers=LAYERS)
    model = decoder()
    InsertGuard(spec)(model)
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    taken = ExtractGuard()(model)
    assert {node.domain for node in taken.graph} == {DOMAIN}
    assert "w" not in taken.graph.initializers
    names = {str(value.name) for value in taken.graph.inputs}
    assert names == {
        "reached/layers.0.residual",
        "reached/layers.2.ffn_output",
        "attention_mask",
        "guard_state",
    }
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before
