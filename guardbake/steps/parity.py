"""The parity stage: PyTorch reference and ONNX model on the same feeds, three forms mixed."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import zip_longest
from pathlib import Path

import onnx_ir as ir

from guardbake.batch import Batch
from guardbake.bundle.folders import partial_folder
from guardbake.bundle.manifest import DECODER
from guardbake.check.parity import Pair, ParityReport, compare
from guardbake.passes.tap import TapEdits
from guardbake.plugins import Runner, Trace
from guardbake.recipe import ParitySection
from guardbake.samples import Form, Sample
from guardbake.spec import GuardSpec
from guardbake.steps.fit import Advance
from guardbake.steps.recheck import budgets_of
from guardbake.steps.rewrite import load_graph
from guardbake.steps.split import Splits
from guardbake.vlm.load import Vlm
from guardbake.vlm.requests import Typography, batches
from guardbake.vlm.runner import TorchRunner, in_float64

BATCH = 12  # prompts at a time: all their prefill logits are kept, for five runs
CHUNK = 7  # a prompt is also fed in pieces of this many tokens, which divides no usual length


@contextmanager
def tapped(model_folder: Path, beside: Path) -> Iterator[Path]:
    """A folder with the same model, its guarded FFN outputs exposed; gone on exit.

    The weights are linked, not copied, and so must be on the file system of `beside`.
    """
    with partial_folder(beside / "tapped") as folder:
        for path in model_folder.iterdir():
            if path.is_file() and path.name != DECODER:
                os.link(path, folder / path.name)
        model = load_graph(model_folder / DECODER)
        TapEdits()(model)
        ir.save(model, folder / DECODER)
        yield folder


def mixed(samples: Sequence[Sample]) -> list[Sample]:
    """Samples reordered so that a batch mixes forms, and with them lengths and images."""
    by_form: dict[Form, list[Sample]] = {}
    for sample in samples:
        by_form.setdefault(sample.form, []).append(sample)
    return [s for group in zip_longest(*by_form.values()) for s in group if s is not None]


def measure(
    vlm: Vlm,
    spec: GuardSpec,
    splits: Splits,
    typography: Typography,
    section: ParitySection,
    runners: Mapping[str, Runner],
    advance: Advance,
) -> tuple[ParityReport, dict[str, tuple[Batch, Trace]]]:
    """Compare, and return the report with the runs that may serve as golden ones.

    runners: "candidate" the shipped graph, "tapped" the same with its FFN outputs exposed. The
    reference computes in float64, so that a difference is the candidate's own rounding.
    """
    samples = mixed(splits.samples("parity"))
    reference, undefended = TorchRunner(vlm, spec), TorchRunner(vlm, None)
    pairs: list[Pair] = []
    golden: dict[str, tuple[Batch, Trace]] = {}
    with in_float64(vlm):
        for number, (some, batch) in enumerate(batches(vlm, samples, typography, BATCH)):
            name = f"batch {number}"
            truth = reference.run(batch, section.steps)
            steps, fed = truth.tokens.shape[1], truth.tokens
            pairs.append(
                Pair(
                    name,
                    truth,
                    runners["tapped"].run(batch, steps, fed),
                    runners["candidate"].run(batch, section.steps),
                    undefended.run(batch, steps, fed),
                )
            )
            if number == 0:
                golden[name] = batch, truth
                chunked = runners["tapped"].run(batch, steps, fed, chunk=CHUNK)
                pairs.append(Pair(f"{name} in chunks of {CHUNK}", truth, chunked, None, None))
            advance("parity", number * BATCH + len(some), len(samples))
    gated = bool(spec.sensors)
    return compare(pairs, budgets_of(section), gated), golden
