"""One attack on a batch of requests: what goes in, what is found, and its file."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from guardbake.errors import MalformedError
from guardbake.evaluate.arms import Arm
from guardbake.evaluate.attacks.compliance import MARGIN, PUNISHED, WIDTH, Compliance, Floats
from guardbake.evaluate.attacks.pgd import Budget, Bytes, search
from guardbake.vlm.load import Vlm


@dataclass(frozen=True, eq=False)
class Target:
    """What is attacked: N texts beside clean images [N, H, W, 3], and the turn wanted of each.

    universal: one image for all texts, found from the first clean image, instead of one each.
    """

    arm: Arm
    texts: Sequence[str]
    clean: Bytes
    turns: Sequence[str]
    universal: bool

    def key(self, vlm: Vlm, budget: Budget) -> dict[str, Any]:
        """Everything the images found depend on, by digest; no prompt is in it."""
        start = self.clean[:1] if self.universal else self.clean
        return {
            "model": vlm.model_digest,
            "arm": {name: _digest(str(value)) for name, value in self.arm.key.items()},
            "texts": [_digest(text) for text in self.texts],
            "turns": [_digest(turn) for turn in self.turns],
            "images": [hashlib.sha256(image.tobytes()).hexdigest() for image in start],
            "universal": self.universal,
            "budget": asdict(budget),
            "surrogate": {"punished": PUNISHED, "margin": MARGIN, "width": WIDTH},
        }


@dataclass(frozen=True, eq=False)
class Found:
    """images [N, H, W, 3] of 8 bit, N = 1 if universal. before, after [texts] float64: surprise of
    the wanted turns, nats a token, beside the clean images and those found. score_before,
    score_after: the gate's score at the last prompt token, NaN without a gate."""

    images: Bytes
    before: Floats
    after: Floats
    score_before: Floats
    score_after: Floats


def attack(vlm: Vlm, target: Target, budget: Budget, tick: Callable[[], None]) -> Found:
    """Search images within the budget. tick: called after each of budget.steps steps."""
    count = len(target.texts)
    start = target.clean[:1] if target.universal else target.clean
    everywhere = np.broadcast_to(start, (count, *start.shape[1:]))
    loss = Compliance(vlm, target.arm, target.texts, everywhere, target.turns)
    lowered = (lambda images: loss(images).mean()[None]) if target.universal else loss
    images = search(start, lowered, budget, tick)
    before, after = loss.measure(start), loss.measure(images)
    unknown = np.full(count, np.nan)
    return Found(
        images,
        before.surprise,
        after.surprise,
        unknown if before.score is None else before.score,
        unknown if after.score is None else after.score,
    )


def save_found(found: Found, path: Path) -> None:
    """One safetensors file."""
    save_file({name: np.ascontiguousarray(array) for name, array in vars(found).items()}, path)


def load_found(path: Path) -> Found:
    """Read what `save_found` wrote; MalformedError if the file is anything else."""
    try:
        return Found(**load_file(path))
    except (OSError, SafetensorError, TypeError) as error:
        raise MalformedError(
            found=f"{type(error).__name__}",
            expected="the images of an attack",
            where=str(path),
            remedy="remove the stage's folder and evaluate again",
        ) from error


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
