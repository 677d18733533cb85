"""Parity of a finished bundle with its own golden runs: no PyTorch, no source model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from guardbake.artifact import load_guard
from guardbake.batch import Batch
from guardbake.bundle.manifest import GUARD
from guardbake.check.golden import load_golden
from guardbake.check.parity import Budget, Budgets, Pair, ParityReport, compare
from guardbake.errors import IntegrityError
from guardbake.plugins import Runner, RunnerFactory, Trace
from guardbake.recipe import ParitySection, Tolerance
from guardbake.steps.certify import require_parity
from guardbake.steps.records import read_record

GOLDEN, RECIPE = "golden.safetensors", "recipe.json"


def budgets_of(section: ParitySection) -> Budgets:
    def budget(tolerance: Tolerance) -> Budget:
        return Budget(tolerance.budget, tolerance.source)

    return Budgets(
        budget(section.score),
        budget(section.ffn_output),
        budget(section.logits),
        budget(section.margin_band),
    )


def recheck(bundle: Path, runner: RunnerFactory) -> dict[str, Any]:
    """Run the golden feeds through `runner(bundle)` and compare; returns the report.

    The bundle's bytes are not verified here: an altered graph is judged by what it computes.
    Raises ParityError if a budget is broken, MalformedError if the bundle lacks what it needs.
    """
    spec = load_guard(bundle / GUARD)
    runs, guard = load_golden(bundle / GOLDEN)
    if guard != spec.digest:
        raise IntegrityError(
            found=f"golden runs of guard {guard[:12]}",
            expected=f"runs of guard {spec.digest[:12]}",
            where=str(bundle / GOLDEN),
            remedy="bake again",
        )
    section = ParitySection.model_validate(read_record(bundle / RECIPE).get("parity"))
    report = _measure(runs, runner(bundle), budgets_of(section), bool(spec.sensors))
    require_parity(report.to_json())
    return report.to_json()


def _measure(
    runs: Mapping[str, tuple[Batch, Trace]], runner: Runner, budgets: Budgets, gated: bool
) -> ParityReport:
    pairs = []
    for name, (batch, truth) in runs.items():
        steps = truth.tokens.shape[1]
        forced = runner.run(batch, steps, truth.tokens, keep_prefill=False)
        free = runner.run(batch, steps, keep_prefill=False)
        pairs.append(Pair(name, truth, forced, free, None))
    return compare(pairs, budgets, gated)
