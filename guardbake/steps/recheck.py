"""Parity of a finished bundle with its own golden runs: no PyTorch, no source model."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

from guardbake.artifact import load_guard
from guardbake.bundle.manifest import DECODER, GUARD, RECIPE
from guardbake.check.comparison import Budget, Budgets
from guardbake.check.feeding import fed_otherwise, same_however_fed
from guardbake.check.floors import Standard
from guardbake.check.golden import Golden, load_golden
from guardbake.check.parity import Pair, compare
from guardbake.errors import IntegrityError
from guardbake.plugins import OpenSession, RunnerFactory
from guardbake.recipe import ParitySection
from guardbake.spec import GuardSpec
from guardbake.steps.nodes import hold_nodes
from guardbake.steps.records import read_record

GOLDEN = "golden.safetensors"


def budgets_of(section: ParitySection) -> Budgets:
    """Every budget that the section declares."""
    declared: dict[str, Any] = {
        name: Budget(tolerance.budget, tolerance.source)
        for name in (field.name for field in fields(Budgets))
        if (tolerance := getattr(section, name, None)) is not None
    }
    return Budgets(**declared)


def recheck(
    bundle: Path, runner: RunnerFactory, open_session: OpenSession, engines: Path | None = None
) -> dict[str, Any]:
    """Run the golden feeds through `runner(bundle, engines)` and compare; returns the report.

    It says under "settings" what computed each graph. The guard's nodes are run alone as well, in
    `open_session`, on the golden vectors. A decoder in half precision is held to multiples of
    the reference's own noise in it (`check.floors`). The bundle's bytes are not verified here: an
    altered graph is judged by what it computes; whether all of it passed is in the report, see
    `require_parity`. Raises MalformedError if the bundle lacks what it needs, UnsupportedError for
    a precision that was not measured, IntegrityError if its golden runs are of another guard.
    """
    spec, golden, standard = read_golden(bundle)
    running = runner(bundle, engines)
    own, budgets = standard.budgets(golden.number), standard.budgets(running.number)
    found = hold_nodes(bundle / DECODER, spec, golden.vectors, open_session, own)
    pairs = []
    for name, (batch, truth) in golden.runs.items():
        steps = truth.tokens.shape[1]
        forced = running.run(batch, steps, truth.tokens, keep_prefill=False)
        free = running.run(batch, steps, keep_prefill=False)
        pairs.append(Pair(name, truth, forced, free, None))
        found += same_however_fed(fed_otherwise(running, batch, forced), forced, budgets)
    noise = standard.noise_in(running.number)
    report = compare(pairs, budgets, bool(spec.sensors), noise, found).to_json()
    return {**report, "settings": dict(running.settings)}


def read_golden(bundle: Path) -> tuple[GuardSpec, Golden, Standard]:
    """A bundle's guard, what it was seen to do, and what its recipe holds a candidate to."""
    spec, golden = load_guard(bundle / GUARD), load_golden(bundle / GOLDEN)
    if golden.guard != spec.digest:
        raise IntegrityError(
            found=f"golden runs of guard {golden.guard[:12]}",
            expected=f"runs of guard {spec.digest[:12]}",
            where=str(bundle / GOLDEN),
            remedy="bake again",
        )
    section = ParitySection.model_validate(read_record(bundle / RECIPE).get("parity"))
    return spec, golden, Standard(budgets_of(section), golden.noise, golden.floors)
