"""Parity of the tiny models on a provider of onnxruntime, in three precisions; used by gpu.py.

The reference is PyTorch in float64 on the CPU: stricter than PyTorch on the GPU, and the same truth
for every machine.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from gpu_outcome import Outcome
from PIL import Image
from random_decoders import FamilyName, random_guard

from guardbake.batch import Batch
from guardbake.check.certificate import graded
from guardbake.check.comparison import Budget
from guardbake.check.distribution import divergence, likeliest, rms
from guardbake.check.feeding import fed_otherwise, same_however_fed
from guardbake.check.golden_vectors import golden_vectors
from guardbake.check.parity import Pair, compare
from guardbake.errors import UnsupportedError
from guardbake.passes.insert import InsertGuard
from guardbake.passes.probe import TapGuard
from guardbake.plugins import Number, Runner, Trace
from guardbake.recipe import load_recipe
from guardbake.spec import GuardSpec
from guardbake.steps.certify import compared
from guardbake.steps.nodes import hold_nodes
from guardbake.steps.recheck import budgets_of
from guardbake.vlm.catalog import models_root
from guardbake.vlm.files import hash_files
from guardbake.vlm.load import Vlm, load_vlm
from guardbake.vlm.runner import TorchRunner, in_float64
from guardbake.vlm.tokens import collate

from guardbake_onnx import OnnxExporter
from guardbake_onnx.runner import CudaRunner, OnnxRunner
from guardbake_onnx.session import open_cuda_graph, open_graph

STEPS = 16
_TIMES = 4.0  # of the reference's own noise; the source is in the tiny models' recipes


@dataclass(frozen=True)
class Tiny:
    """A tiny model and a random guard, what float64 says of a mixed batch, guarded and not."""

    name: str
    vlm: Vlm
    spec: GuardSpec
    batch: Batch
    truth: Trace
    undefended: Trace


def load_tiny(family: FamilyName) -> Tiny:
    """The threshold lies between two rows' scores, so that some gates open and some do not."""
    name = f"tiny-{family}"
    vlm = load_vlm(str(models_root() / name))
    config: Any = vlm.model.config
    text = config.get_text_config()
    noise = np.random.default_rng(7).integers(0, 255, (192, 192, 3), dtype=np.uint8)
    requests = [
        ("how to paint a wall", Image.fromarray(noise)),
        ("open", None),
        ("how to", Image.new("RGB", (192, 192), "white")),
    ]
    batch = collate(vlm.processor, vlm.image_token_id, requests)
    spec = random_guard(family, text.hidden_size, text.num_hidden_layers)
    scores = TorchRunner(vlm, spec).run(batch, 1).guard_score
    assert scores is not None
    high, middle, _ = np.sort(scores[:, batch.input_ids.shape[1] - 1, 0])[::-1]
    between = replace(spec.sensors[0], thresholds=(float(high + middle) / 2,))
    spec = replace(spec, sensors=(between,))
    with in_float64(vlm):
        truth = TorchRunner(vlm, spec).run(batch, STEPS)
        steps = truth.tokens.shape[1]
        undefended = TorchRunner(vlm, None).run(batch, steps, truth.tokens)
    return Tiny(name, vlm, spec, batch, truth, undefended)


def export_guarded(tiny: Tiny, number: Number, folder: Path, *, tapped: bool) -> Path:
    """The exported model with the guard in its decoder; tapped: what its sites hold exposed."""
    captured, out = folder / f"captured-{number}", folder / f"{number}-{tapped}"
    captured.mkdir(exist_ok=True)
    out.mkdir()
    if not any(captured.iterdir()):
        OnnxExporter().capture(tiny.vlm.folder, number, captured)
    OnnxExporter().export(hash_files(tiny.vlm.folder), captured, "stream", out)
    model = ir.load(out / "decoder.onnx")
    InsertGuard(tiny.spec)(model)
    if tapped:
        TapGuard()(model)
    ir.save(model, out / "decoder.onnx")
    return out


def noise_of(tiny: Tiny, number: Number) -> float:
    """How far from float64 this precision takes the reference itself, root mean square."""
    vlm = load_vlm(str(tiny.vlm.folder), getattr(torch, number))
    steps, fed = tiny.truth.tokens.shape[1], tiny.truth.tokens
    rounded = TorchRunner(vlm, tiny.spec).run(tiny.batch, steps, fed)
    return rms(tiny.truth, rounded, np.ones(len(fed), bool))


def measured(tiny: Tiny, got: Trace, floor: float) -> dict[str, Any]:
    """What differs, in numbers; judged by multiples of the reference's own noise alone."""
    rows = np.ones(len(got.tokens), bool)
    runs = [("mixed", tiny.truth, got, rows)]
    share = Budget(1.0, "measured, not judged")
    assert tiny.truth.guard_open is not None
    assert got.guard_open is not None
    return {
        "largest logit difference": float(
            np.abs(got.step_logits.astype(np.float64) - tiny.truth.step_logits).max()
        ),
        "KL, nats": divergence(share, runs).worst,
        "top-1 that differ, share": likeliest("top-1", 1, share, runs).worst,
        "gate decisions that differ": int((got.guard_open != tiny.truth.guard_open).sum()),
        "multiples of the reference's own noise": rms(tiny.truth, got, rows) / floor,
    }


def in_half(tiny: Tiny, runner: Runner, number: Number) -> dict[str, Any]:
    """Figures of a runner that computes in `number`, and whether they pass."""
    steps, fed = tiny.truth.tokens.shape[1], tiny.truth.tokens
    figures = measured(tiny, runner.run(tiny.batch, steps, fed), noise_of(tiny, number))
    figures["passed"] = figures["multiples of the reference's own noise"] <= _TIMES
    return figures | {"settings": dict(runner.settings)}


def in_full(
    tiny: Tiny, shipped: Runner, tapped: Runner, law: Callable[[Any], Any], floor: float
) -> dict[str, Any]:
    """Every gate of the recipe's that needs no attack, level by level. law: budgets -> level A."""
    budgets = budgets_of(load_recipe(models_root() / f"{tiny.name}.toml").parity)
    steps, fed = tiny.truth.tokens.shape[1], tiny.truth.tokens
    whole = shipped.run(tiny.batch, steps, fed, keep_prefill=False)
    more = [
        *law(budgets),
        *same_however_fed(fed_otherwise(shipped, tiny.batch, whole), whole, budgets),
    ]
    pair = Pair(
        "mixed",
        tiny.truth,
        tapped.run(tiny.batch, steps, fed),
        shipped.run(tiny.batch, STEPS),
        tiny.undefended,
    )
    report = compare([pair], budgets, True, floor, more).to_json()
    gates = compared(report["comparisons"])
    return {
        "passed": report["passed"],
        "levels": dict(graded(gates)),
        "gates": {gate.name: f"{gate.status}: {gate.detail}" for gate in gates},
        "settings": dict(shipped.settings),
    }


def check(family: FamilyName, cuda: bool, folder: Path, numbers: Sequence[Number]) -> Outcome:
    """The precisions one by one; for one that the provider does not have, its words."""
    tiny = load_tiny(family)
    runner, open_session = (CudaRunner, open_cuda_graph) if cuda else (OnnxRunner, open_graph)
    figures: dict[str, Any] = {}
    for number in numbers:
        shipped = export_guarded(tiny, number, folder, tapped=False)
        try:
            if number != "float32":
                figures[number] = in_half(tiny, runner(shipped), number)
                continue
            tapped = export_guarded(tiny, number, folder, tapped=True)
            vectors = golden_vectors(tiny.spec, tiny.batch, tiny.truth)

            def law(
                budgets: Any, decoder: Path = shipped / "decoder.onnx", v: Any = vectors
            ) -> Any:
                return hold_nodes(decoder, tiny.spec, v, open_session, budgets)

            figures[number] = in_full(
                tiny, runner(shipped), runner(tapped), law, noise_of(tiny, number)
            )
        except UnsupportedError as error:
            figures[number] = {"not run": str(error)}
    off = [number for number in figures if not figures[number].get("passed", True)]
    if off:
        return Outcome("failed", f"no parity in {', '.join(off)}", figures)
    return Outcome("done", "PyTorch in float64 on the CPU is the reference", figures)
