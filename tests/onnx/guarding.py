"""Guards put into exported graphs, and how near such a graph must be to the guarded reference.

Budgets: 1e-4 on logits and FFN outputs, the float32 noise of another summation order on values of
order 1 to 10 (seen: below 2e-5).
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir

from guardbake.check.comparison import Budget, Budgets
from guardbake.passes.insert import InsertGuard
from guardbake.passes.probe import TapGuard
from guardbake.passes.verify import VerifyGuard
from guardbake.spec import GuardSpec, Sensor

from guardbake_onnx.runner import OnnxRunner

NOISE = Budget(1e-4, "float32 noise of another summation order, values of order 1 to 10")
BUDGETS = Budgets(NOISE, NOISE, NOISE, Budget(1e-3, "ten times the score's noise"))


def between(spec: GuardSpec, gate: int, scores: np.ndarray) -> GuardSpec:
    """The same guard with the gate's threshold between the largest and the next score [B]."""
    sensors = list(spec.sensors)
    high, low = np.sort(scores)[::-1][:2]
    middle = float((high + low) / 2)
    old = sensors[gate]
    sensors[gate] = Sensor(old.readings, tuple(t + middle for t in old.thresholds))
    return replace(spec, sensors=tuple(sensors))


def guarded_runner(folder: Path, spec: GuardSpec, target: Path, tap: bool) -> OnnxRunner:
    target.mkdir()
    for path in folder.iterdir():
        if path.name != "decoder.onnx":
            shutil.copyfile(path, target / path.name)  # a link would spoil the others' export
    model = ir.load(folder / "decoder.onnx")
    InsertGuard(spec)(model)
    VerifyGuard(spec, "the test")(model)
    if tap:
        TapGuard()(model)
    ir.save(model, target / "decoder.onnx")
    return OnnxRunner(target)
