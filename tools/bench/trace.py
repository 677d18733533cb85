"""Causal tracing by resuming against the plain loop: the same numbers, how much sooner.

    python tools/bench/trace.py models/demo.toml CHECKPOINT [--prompts 6] [--every 10]

The same fitting prompts, harmful, as text and as typographic image, in one process. Resuming runs
every ablation of every layer. The loop runs the whole model under hooks, so that its cost does not
depend on the layer: it runs every `every`-th layer, and seconds are given per ablation. It is run
twice: one prompt at a time, as the public code of CARE does, and all prompts of a form in one
left-padded batch. In both an opening's further tokens go through the cache. For "resample" the
donors run along. Seconds are of the processor, not of the clock, so that other work on the machine
counts less.

Expected from counting: resuming runs 14.5 of 30 layers on average, a ratio of 2.07; openings as
branches of one sequence and larger batches add to that where prompts are short; resample doubles
the loop, whose donors run along again for every ablation. Seen on the demo, one thread, while other
work ran beside it:

============================  ==========  ========  =====
ratio to resuming             skip, mean  resample  all
============================  ==========  ========  =====
text, one by one              10.6        13.7      11.6
text, batched                 3.9         5.3       4.4
typographic, one by one       4.7         7.2       5.5
typographic, batched          2.4         4.4       3.04
============================  ==========  ========  =====

Scores differed by at most 5e-5 of up to 22. Long prompts fill a batch by themselves: there little
is won but the layers below.
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
from guardbake.steps.diagnose import TOKENS_AT_A_TIME
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
        self.tracer = Tracer(vlm, self.openings, TOKENS_AT_A_TIME)
        self.prompts = embed_prompts(vlm, own, draw, 32)
        harmless = embed_prompts(vlm, benign, draw, 32)
        lengths = [len(p) for p in self.prompts]
        chosen = choose_donors(lengths, [len(p) for p in harmless], 0)
        self.donors = [harmless[i] for i in chosen]
        self.means = self.tracer.means(harmless)
        self._vlm, self._draw, self._own = vlm, draw, own
        self._others = [benign[i] for i in chosen]

    def loop(self, size: int, donors: bool) -> list[AblatedBatch]:
        """The prompts `size` at a time, with their donors if asked for."""
        out = []
        for start in range(0, len(self._own), size):
            some, others = (x[start : start + size] for x in (self._own, self._others))
            requests = some + others if donors else some
            ((_, batch),) = batches(self._vlm, requests, self._draw, len(requests))
            out.append(AblatedBatch(self._vlm, batch, len(some), self.means))
        return out

    def resumed(self, wanted: Sequence[Ablation]) -> dict[Ablation, np.ndarray]:
        traced = self.tracer.trace(
            self.prompts, self.donors, self.means, wanted, lambda _done, _total: None
        )
        return dict(traced.ablated)

    def looped(
        self, wanted: Sequence[Ablation], loop: Sequence[AblatedBatch]
    ) -> dict[Ablation, np.ndarray]:
        return {
            a: np.concatenate([batch.score(a, self.openings) for batch in loop]) for a in wanted
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("checkpoint")
    parser.add_argument("--prompts", type=int, default=6)
    parser.add_argument("--every", type=int, default=10)
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
    """Seconds an ablation in each way, apart for resample, and the largest difference of scores."""
    out: dict[str, Any] = {}
    totals: dict[str, float] = dict.fromkeys(("resumed", "one by one", "batched"), 0.0)
    worst = 0.0
    for name, kinds in (("skip, mean", ("skip", "mean")), ("resample", ("resample",))):
        full = [a for a in everything if a.kind in kinds]
        few = [a for a in some if a.kind in kinds]
        started = time.process_time()
        resumed = contest.resumed(full)
        each = {"resumed": (time.process_time() - started) / len(full)}
        for way, size in (("one by one", 1), ("batched", len(contest.prompts))):
            loop = contest.loop(size, name == "resample")
            started = time.process_time()
            scores = contest.looped(few, loop)
            each[way] = (time.process_time() - started) / len(few)
            worst = max(worst, *(float(np.abs(s - resumed[a]).max()) for a, s in scores.items()))
        ratios = {way: each[way] / each["resumed"] for way in ("one by one", "batched")}
        out[name] = {"seconds": each, "ratios": ratios}
        for way, seconds in each.items():
            totals[way] += seconds * len(full)
    ratios = {way: totals[way] / totals["resumed"] for way in ("one by one", "batched")}
    return out | {"ratios of all": ratios, "largest difference": worst}


if __name__ == "__main__":
    main()
