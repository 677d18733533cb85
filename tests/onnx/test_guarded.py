"""The guarded graph against the guarded reference: every profile, every edit, both families.

Neither rendering imports the other; what they share is the spec.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from guardbake.batch import Batch
from guardbake.check.parity import Pair, compare
from guardbake.site import Site
from guardbake.spec import GuardSpec, Profile, Sensor
from guardbake.vlm.runner import TorchRunner

from tests.onnx.guarding import BUDGETS, NOISE, between, guarded_runner

STEPS = 16
CASES: list[tuple[Profile, str]] = [
    ("always", "care"),
    ("always", "care parallel"),
    ("always", "project"),
    ("token", "care sequential"),
    ("token", "care"),
    ("token", "steer"),
    ("sequence", "astra"),
    ("sequence", "care"),
    ("sequence", "project"),
    ("sequence", "add"),
    ("sequence", "replace"),
    ("sequence", "steer"),
    ("sequence", "steer after pooling"),
    ("sequence", "add by two gates"),
    ("token", "steer by two gates"),
]


def _guard_for(
    exported: object, make: Callable[..., GuardSpec], case: tuple[str, str]
) -> GuardSpec:
    """Two edits and the sensor before them; one that pools reads two sites.

    Of two gates the second one reads behind the first edit.
    """
    config = exported.vlm.model.config.get_text_config()  # type: ignore[attr-defined]
    profile, pools = case[0], case[1].endswith("after pooling")
    kind = case[1].removesuffix(" after pooling").removesuffix(" by two gates")
    spec = make(
        profile,
        kind,
        pools=pools,
        later=(Site(3, "residual"),) if case[1].endswith("by two gates") else (),
        width=config.hidden_size,
        layers=config.num_hidden_layers,
        sensor=(Site(0, "residual"), Site(1, "residual")) if pools else Site(1, "residual"),
        edits=(2, 4),
        strength=2.0,
        threshold=0.0,
        gains=case[1] != "replace",
    )
    return spec


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_guarded_graph_equals_guarded_reference(
    exported: object,
    mixed_batch: Batch,
    guard: Callable[..., GuardSpec],
    case: tuple[Profile, str],
    tmp_path: Path,
) -> None:
    torch.set_num_threads(1)
    spec = _guard_for(exported, guard, case)
    vlm, folder = exported.vlm, exported.folder  # type: ignore[attr-defined]
    for gate in range(len(spec.sensors)):
        scores = TorchRunner(vlm, spec).run(mixed_batch, 1).guard_score
        assert scores is not None
        spec = between(spec, gate, scores[:, mixed_batch.input_ids.shape[1] - 1, gate])
    truth = TorchRunner(vlm, spec).run(mixed_batch, STEPS)
    steps = truth.tokens.shape[1]
    plain = TorchRunner(vlm, None).run(mixed_batch, steps, truth.tokens)
    tapped = guarded_runner(folder, spec, tmp_path / "tapped", True)
    shipped = guarded_runner(folder, spec, tmp_path / "shipped", False)
    pairs = [
        Pair(
            "mixed",
            truth,
            tapped.run(mixed_batch, steps, truth.tokens),
            shipped.run(mixed_batch, STEPS),
            plain,
        ),
        Pair("in chunks", truth, tapped.run(mixed_batch, steps, truth.tokens, 5), None, None),
    ]
    report = compare(pairs, BUDGETS, gated=bool(spec.sensors))
    broken = [(c.quantity, c.worst, c.where) for c in report.comparisons if not c.passed]
    assert not broken
    assert sum("FFN output" in c.quantity for c in report.comparisons) == len(spec.edits)
    if spec.profile == "sequence":
        assert truth.guard_state is not None
        opened = truth.guard_open
        assert opened is not None
        at_end = opened[:, mixed_batch.input_ids.shape[1] - 1]
        assert at_end.sum(axis=0).tolist() == [1] * len(spec.sensors)
        bits = 2 ** np.arange(len(spec.sensors))
        assert truth.guard_state.tolist() == (1 + at_end @ bits).tolist()
        assert not opened[:, : mixed_batch.input_ids.shape[1] - 1].any()


def test_a_closed_guard_is_the_unguarded_graph_bit_for_bit(
    exported: object, mixed_batch: Batch, guard: Callable[..., GuardSpec], tmp_path: Path
) -> None:
    spec = _guard_for(exported, guard, ("sequence", "care"))
    sensor = Sensor(spec.sensors[0].readings, (1e9,))
    closed = replace(spec, sensors=(sensor,))
    runner = guarded_runner(exported.folder, closed, tmp_path / "closed", False)  # type: ignore[attr-defined]
    ours = runner.run(mixed_batch, 8)
    plain = exported.runner.run(mixed_batch, 8)  # type: ignore[attr-defined]
    assert ours.guard_state is not None
    assert (ours.guard_state == 1).all()
    assert np.array_equal(ours.step_logits, plain.step_logits)
    assert np.array_equal(ours.prefill_logits, plain.prefill_logits)


def test_a_batch_of_mixed_lengths_is_each_row_alone(
    exported: object, mixed_batch: Batch, guard: Callable[..., GuardSpec], tmp_path: Path
) -> None:
    """The text-only row alone, without the padding that its neighbours give it."""
    spec = _guard_for(exported, guard, ("sequence", "care"))
    runner = guarded_runner(exported.folder, spec, tmp_path / "guarded", False)  # type: ignore[attr-defined]
    together = runner.run(mixed_batch, 8)
    real = mixed_batch.attention_mask[1] == 1
    alone = runner.run(
        Batch(
            mixed_batch.input_ids[1:2, real],
            mixed_batch.attention_mask[1:2, real],
            mixed_batch.image_mask[1:2, real],
            None,
            None,
        ),
        8,
    )
    assert together.guard_state is not None
    assert alone.guard_state is not None
    assert together.guard_state[1] == alone.guard_state[0]
    steps = alone.tokens.shape[1]
    assert np.array_equal(together.tokens[1, :steps], alone.tokens[0])
    assert np.abs(together.step_logits[1, :steps] - alone.step_logits[0]).max() < NOISE.limit
