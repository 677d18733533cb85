"""What each row of an evaluation costs a request: processor time against the undefended model.

    python tools/bench/arms.py RECIPE OUT [--prompts 8] [--rounds 5] [--json FILE]

OUT: what `guardbake evaluate RECIPE` wrote, or is to write; guards and rivals are fitted in the
workspace beside it unless they are there. Harmless prompts of the test split, drawn, one batch: the
whole prompt and then the undefended model's own answer forced upon every row, so that all feed the
same number of new tokens. The rows take turns; each is divided by the undefended model of its own
round, and the median of the rounds is told. "control" is the undefended model once more: it shows
the noise. All of it is PyTorch under hooks, where rows can be compared; what the baked guard costs
in onnxruntime is run.py's to tell.

Expected from counting: a gated edit adds a few products of [B, S, d] with one column to 30 layers,
so 1.00 to 1.02; the safety sentence feeds some twenty tokens more; `replace` feeds the text once
more. A fine-tune is merged into the weights and costs nothing.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from guardbake.batch import Batch
from guardbake.evaluate.arms import Arm
from guardbake.evaluation import fitted_arms
from guardbake.pipeline import Bake
from guardbake.progress import reporter_for
from guardbake.samples.collect import in_forms
from guardbake.steps.families import drawn
from guardbake.vlm.low_rank import merged
from guardbake.vlm.requests import batches
from guardbake.vlm.runner import TorchRunner

CONTROL = "control"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    work = Bake(arguments.recipe, arguments.out, reporter_for("plain"))
    ratios = measure(work, fitted_arms(work), arguments.prompts, arguments.rounds)
    result = {"machine": f"{platform.machine()}, one thread", "ratios": ratios}
    print(json.dumps(result, indent=2))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def measure(work: Bake, arms: Sequence[Arm], prompts: int, rounds: int) -> dict[str, float]:
    """By row: median over the rounds of its processor time over the undefended model's."""
    assert work.recipe.evaluate is not None
    samples = in_forms(drawn(work.splits.prompts["test"], "harmless", prompts), ("typographic",))
    asked: list[tuple[str, Arm, Batch]] = []
    for name, arm in [*((arm.name, arm) for arm in arms), (CONTROL, arms[0])]:
        ((_, batch),) = batches(work.vlm, samples, arm.asking(work.typography), len(samples))
        asked.append((name, arm, batch))
    steps = work.recipe.evaluate.tokens
    answer = TorchRunner(work.vlm, None).run(asked[0][2], steps).tokens
    found: dict[str, list[float]] = {name: [] for name, _, _ in asked}
    for turn in range(rounds + 1):
        seconds = {}
        at = turn % len(asked)
        for name, arm, batch in asked[at:] + asked[:at]:
            runner = TorchRunner(work.vlm, arm.spec)
            with merged(work.vlm, arm.tuned):
                started = time.process_time()
                runner.run(batch, answer.shape[1], answer, keep_prefill=False)
                seconds[name] = time.process_time() - started
        if turn:  # the first warms up
            for name, one in seconds.items():
                found[name].append(one / seconds[arms[0].name])
    return {name: round(statistics.median(ratios), 3) for name, ratios in found.items()}


if __name__ == "__main__":
    main()
