"""The parity stage: PyTorch reference and ONNX model on the same feeds, three forms mixed."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path

import numpy as np
import onnx_ir as ir

from guardbake.batch import Batch
from guardbake.bundle.folders import partial_folder
from guardbake.bundle.graphs import load_graph
from guardbake.bundle.manifest import DECODER
from guardbake.check.comparison import Budgets, Comparison
from guardbake.check.distribution import rms
from guardbake.check.feeding import CHUNK, fed_otherwise, same_however_fed
from guardbake.check.floors import Standard, measure_floors
from guardbake.check.golden import Golden
from guardbake.check.golden_vectors import golden_vectors
from guardbake.check.parity import Pair, ParityReport, compare
from guardbake.passes.probe import TapGuard
from guardbake.plugins import Number, OpenSession, Runner, Trace
from guardbake.recipe import ParitySection
from guardbake.samples import Form, Sample
from guardbake.spec import GuardSpec
from guardbake.steps.fit import Advance
from guardbake.steps.nodes import hold_nodes
from guardbake.steps.recheck import budgets_of
from guardbake.steps.split import Splits
from guardbake.vlm.load import Vlm, load_rounded
from guardbake.vlm.requests import Typography, batches
from guardbake.vlm.runner import TorchRunner, in_float64

BATCH = 12  # prompts at a time: all their prefill logits are kept, for five runs


@contextmanager
def tapped(model_folder: Path, beside: Path) -> Iterator[Path]:
    """A folder with the same model, what reaches its guard and leaves it exposed; gone on exit.

    The weights are linked, not copied, and so must be on the file system of `beside`.
    """
    with partial_folder(beside / "tapped") as folder:
        for path in model_folder.iterdir():
            if path.is_file() and path.name != DECODER:
                os.link(path, folder / path.name)
        model = load_graph(model_folder / DECODER)
        TapGuard()(model)
        ir.save(model, folder / DECODER)
        yield folder


def mixed(samples: Sequence[Sample]) -> list[Sample]:
    """Samples reordered so that a batch mixes forms, and with them lengths and images."""
    by_form: dict[Form, list[Sample]] = {}
    for sample in samples:
        by_form.setdefault(sample.form, []).append(sample)
    return [s for group in zip_longest(*by_form.values()) for s in group if s is not None]


@dataclass(frozen=True)
class Candidate:
    """What is held against the reference.

    decoder: the shipped graph, whose guard nodes are run alone in `open_session`. shipped: runs it.
    tapped: runs the same with its guarded sites exposed.
    """

    decoder: Path
    open_session: OpenSession
    shipped: Runner
    tapped: Runner


def measure(
    vlm: Vlm,
    spec: GuardSpec,
    splits: Splits,
    typography: Typography,
    section: ParitySection,
    candidate: Candidate,
    halves: Sequence[Number],
    advance: Advance,
) -> tuple[ParityReport, Golden]:
    """Compare, and return the report with the runs that may serve as golden ones.

    The reference computes in float64, so that a difference is the candidate's own rounding. halves:
    precisions in which its own noise is measured; the candidate's must be among them.
    """
    samples = mixed(splits.samples("parity"))
    reference, undefended = TorchRunner(vlm, spec), TorchRunner(vlm, None)
    in_half = {number: TorchRunner(load_rounded(vlm, number), spec) for number in halves}
    rounded: dict[Number, list[tuple[str, Trace, Trace]]] = {number: [] for number in halves}
    pairs: list[Pair] = []
    golden: dict[str, tuple[Batch, Trace]] = {}
    with in_float64(vlm):
        for number, (some, batch) in enumerate(batches(vlm, samples, typography, BATCH)):
            name = f"batch {number}"
            truth = reference.run(batch, section.steps)
            steps, fed = truth.tokens.shape[1], truth.tokens
            forced = candidate.tapped.run(batch, steps, fed)
            free = candidate.shipped.run(batch, section.steps)
            pairs.append(Pair(name, truth, forced, free, undefended.run(batch, steps, fed)))
            for half, runner in in_half.items():
                rounded[half].append((name, truth, runner.run(batch, steps, fed)))
            if number == 0:
                golden[name] = batch, truth
                chunked = candidate.tapped.run(batch, steps, fed, chunk=CHUNK)
                pairs.append(Pair(f"{name} in chunks of {CHUNK}", truth, chunked, None, None))
            advance("parity", number * BATCH + len(some), len(samples))
    found = replace(
        _golden(spec, golden, reference),
        number=candidate.shipped.number,
        floors={half: measure_floors(runs) for half, runs in rounded.items()},
    )
    return _judged(spec, section, candidate, pairs, found), found


def _judged(
    spec: GuardSpec,
    section: ParitySection,
    candidate: Candidate,
    pairs: Sequence[Pair],
    golden: Golden,
) -> ParityReport:
    """The runs, the guard's nodes alone, and every way of feeding, in the candidate's precision."""
    standard = Standard(budgets_of(section), golden.noise, golden.floors)
    budgets, noise = standard.budgets(golden.number), standard.noise_in(golden.number)
    more = hold_nodes(candidate.decoder, spec, golden.vectors, candidate.open_session, budgets)
    more += _however_fed(candidate.shipped, golden.runs, budgets)
    return compare(pairs, budgets, bool(spec.sensors), noise, more)


def _golden(
    spec: GuardSpec, runs: Mapping[str, tuple[Batch, Trace]], reference: TorchRunner
) -> Golden:
    """The runs with vectors of the first, and how far from it float32 takes the reference."""
    batch, truth = next(iter(runs.values()))
    rounded = reference.run(batch, truth.tokens.shape[1], truth.tokens)
    noise = rms(truth, rounded, np.ones(len(truth.tokens), bool))
    return Golden(runs, golden_vectors(spec, batch, truth), spec.digest, noise)


def _however_fed(
    runner: Runner, runs: Mapping[str, tuple[Batch, Trace]], budgets: Budgets
) -> list[Comparison]:
    found = []
    for batch, truth in runs.values():
        whole = runner.run(batch, truth.tokens.shape[1], truth.tokens, keep_prefill=False)
        found += same_however_fed(fed_otherwise(runner, batch, whole), whole, budgets)
    return found
