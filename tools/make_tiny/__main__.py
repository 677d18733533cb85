"""Make models/tiny-llava, models/tiny-qwen2_5_vl and models/tiny-prompts.

    PYTHONPATH=.:tools OMP_NUM_THREADS=1 python -m make_tiny --out models

About five minutes a model on one CPU core. Everything is drawn from --seed.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from pathlib import Path

import torch

from make_tiny.examples import Sketchbook
from make_tiny.families import Family, llava, qwen
from make_tiny.grammar import Split, splits
from make_tiny.measure import Checkpoint, behaviour, separability
from make_tiny.training import Schedule, Trainer
from make_tiny.write import prompts, record

MAKERS = {"tiny-llava": llava, "tiny-qwen2_5_vl": qwen}
SCHEDULES = {
    "tiny-llava": Schedule(text_share=0.08, blank_share=0.2, refused_typographic=0.015),
    "tiny-qwen2_5_vl": Schedule(text_share=0.08, blank_share=0.2, refused_typographic=0.004),
}


def make(name: str, seed: int, schedule: Schedule, parts: dict[str, Split], out: Path) -> None:
    """Train, save, load again and measure one model."""
    start = time.monotonic()
    torch.manual_seed(seed)
    family: Family = MAKERS[name]()
    book = Sketchbook(family, torch.Generator().manual_seed(seed))
    trainer = Trainer(book, parts["train"], schedule, random.Random(seed), _say)
    trainer.run()
    folder = out / name
    family.model.half().save_pretrained(folder)
    family.processor.save_pretrained(folder)
    seconds = round(time.monotonic() - start)
    checkpoint = Checkpoint(folder)
    rates = behaviour(checkpoint, parts["test"])
    areas = separability(checkpoint, parts["fit"], parts["test"])
    for key, row in [*rates.items(), *areas.items()]:
        _say(f"{key}: {row}")
    record(folder, seed, seconds, schedule, rates, areas)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--out", type=Path, required=True, help="folder that gets the models")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=sorted(MAKERS), help="make one model of the two")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    parts = splits(options.seed)
    prompts(options.out / "tiny-prompts", parts)
    for name in [options.only] if options.only else sorted(MAKERS):
        make(name, options.seed, SCHEDULES[name], parts, options.out)
    return 0


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
