"""Causal tracing by resuming against the plain loop: the same numbers, how much sooner.

    python tools/bench/trace.py models/demo.toml CHECKPOINT [--prompts 12] [--every 5]

The same fitting prompts, harmful, as text and as typographic image, in one process. Resuming runs
every ablation of every layer. The loop runs the whole model under hooks, so that its cost does not
depend on the layer: it runs every `every`-th layer, and seconds are given per ablation. It is no
straw man: all prompts of a form go through it in one left-padded batch, an opening's further tokens
go through its cache, and donors run along only where an ablation takes from them. Seconds are of
the processor, not of the clock, so that other work on the machine does not count.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from guardbake.component import Kind, Part
from guardbake.diagnose.ablation import Ablation, ablations, choose_donors
from guardbake.diagnose.openings import openings_of
from guardbake.diagnose.prompts import embed_prompts
from guardbake.diagnose.trace import Tracer
from guardbake.diagnose.trace_loop import AblatedBatch
from guardbake.recipe import Recipe, load_recipe
from guardbake.samples import Form, Sample
from guardbake.steps.split import split_samples
from guardbake.vlm.load import Vlm, load_vlm
from guardbake.vlm.requests import Typography, batches

PARTS: tuple[Part, ...] = ("layer", "attention", "ffn", "pair")
KINDS: tuple[Kind, ...] = ("skip", "mean", "resample")
FORMS: tuple[Form, ...] = ("text", "typographic")


class Contest:
    """One form's prompts, ready for both ways."""

    def __init__(
        self, vlm: Vlm, recipe: Recipe, own: list[Sample], benign: list[Sample], draw: Typography
    ) -> None:
        fit = recipe.fit
        self.openings = openings_of(vlm.processor.tokenizer, fit.refusing, fit.compliant, 2)
        self.tracer = Tracer(vlm, self.openings, 1024)
        self.prompts = embed_prompts(vlm, own, draw, 32)
        harmless = embed_prompts(vlm, benign, draw, 32)
        lengths = [len(p) for p in self.prompts]
        chosen = choose_donors(lengths, [len(p) for p in harmless], 0)
        self.donors = [harmless[i] for i in chosen]
        self.means = self.tracer.means(harmless)
        ((_, alone),) = batches(vlm, own, draw, 2 * len(own))
        beside = [*own, *(benign[i] for i in chosen)]
        ((_, doubled),) = batches(vlm, beside, draw, 2 * len(own))
        self.alone = AblatedBatch(vlm, alone, len(own), self.means)
        self.doubled = AblatedBatch(vlm, doubled, len(own), self.means)

    def resumed(self, wanted: Sequence[Ablation]) -> dict[Ablation, np.ndarray]:
        traced = self.tracer.trace(
            self.prompts, self.donors, self.means, wanted, lambda _done, _total: None
        )
        return dict(traced.ablated)

    def looped(self, wanted: Sequence[Ablation]) -> dict[Ablation, np.ndarray]:
        return {
            a: (self.doubled if a.kind == "resample" else self.alone).score(a, self.openings)
            for a in wanted
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("checkpoint")
    parser.add_argument("--prompts", type=int, default=12)
    parser.add_argument("--every", type=int, default=5)
    arguments = parser.parse_args()
    recipe, vlm = load_recipe(arguments.recipe), load_vlm(arguments.checkpoint)
    section = recipe.samples.typography
    draw = Typography(section.columns, section.rows, section.instruction)
    splits = split_samples(recipe, arguments.recipe.parent, draw, vlm.processor.tokenizer)
    config: Any = vlm.model.config
    everything = list(ablations(config.get_text_config().num_hidden_layers, PARTS, KINDS))
    some = [a for a in everything if a.layer % arguments.every == arguments.every // 2]
    print(json.dumps({"torch": torch.__version__, "threads": torch.get_num_threads()}))
    for form in FORMS:
        rows = splits.samples("fit", (form,))
        own = [s for s in rows if s.label == "harmful"][: arguments.prompts]
        benign = [s for s in rows if s.label == "harmless"][: 4 * arguments.prompts]
        contest = Contest(vlm, recipe, own, benign, draw)
        print(json.dumps({"form": form} | _compare(contest, everything, some)), flush=True)


def _compare(
    contest: Contest, everything: Sequence[Ablation], some: Sequence[Ablation]
) -> dict[str, Any]:
    """Seconds an ablation in both ways, apart for resample; the largest difference of scores."""
    out: dict[str, Any] = {}
    worst = 0.0
    totals = {"resumed": 0.0, "looped": 0.0}
    for name, kinds in (("skip, mean", ("skip", "mean")), ("resample", ("resample",))):
        full = [a for a in everything if a.kind in kinds]
        started = time.process_time()
        resumed = contest.resumed(full)
        middle = time.process_time()
        looped = contest.looped([a for a in some if a.kind in kinds])
        stopped = time.process_time()
        each = (middle - started) / len(resumed), (stopped - middle) / len(looped)
        out[name] = {"resumed": each[0], "looped": each[1], "ratio": each[1] / each[0]}
        totals["resumed"] += each[0] * len(full)
        totals["looped"] += each[1] * len(full)
        worst = max(worst, *(float(np.abs(s - resumed[a]).max()) for a, s in looped.items()))
    ratio = totals["looped"] / totals["resumed"]
    return out | {"ratio of all": ratio, "largest difference": worst}


if __name__ == "__main__":
    main()
