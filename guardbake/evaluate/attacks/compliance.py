"""What an attack on the image lowers: the surprise of a compliant turn, through a defence.

loss = mean over the turn's tokens of -ln p(token)  +  PUNISHED * relu(score / |s0| + MARGIN)

The second term is there for a gated arm only: it draws the prompt's last token below the gate's
threshold. |s0| is the batch's median of |score| on the clean images, so that the term has no unit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from guardbake.batch import Batch
from guardbake.evaluate.arms import Arm
from guardbake.evaluate.attacks.pgd import Bytes
from guardbake.evaluate.attacks.surrogate import SoftGuard
from guardbake.vlm.forced import forced, turn_ids
from guardbake.vlm.load import Vlm
from guardbake.vlm.low_rank import merged
from guardbake.vlm.pixels import pixel_path
from guardbake.vlm.prompt import prepare
from guardbake.vlm.requests import collated
from guardbake.vlm.runner import Session

Floats = npt.NDArray[np.float64]

PUNISHED = 1.0  # weight of a score, in nats a token
MARGIN = 0.2  # how far below the threshold is far enough, in |s0|
WIDTH = 0.2  # of the smooth gate, in |s0|


class Measured(NamedTuple):
    """surprise [N] float64: of the wanted turn, nats a token. score [N] float64: at the prompt's
    last token, the largest of the gates', None without one; for a canned arm the surprise is the
    unguarded model's."""

    surprise: Floats
    score: Floats | None


class Compliance:
    """The loss of N prompts beside N images; call it as `pgd.search` does.

    texts: what stands beside each image, the arm's preamble included. images [N, H, W, 3] of a size
    that the processor takes as it is. turns: the compliant turn wanted of each prompt.
    """

    def __init__(
        self, vlm: Vlm, arm: Arm, texts: Sequence[str], images: Bytes, turns: Sequence[str]
    ) -> None:
        self._vlm = vlm
        self._arm = arm
        shown = [Image.fromarray(image) for image in images]
        requests = list(zip(texts, shown, strict=True))
        self._batch: Batch = collated(vlm, requests)
        self._path = pixel_path(vlm, *images.shape[1:3])
        wanted = forced([turn_ids(vlm, turn, ends=False) for turn in turns])
        self._turns, self._wanted = wanted.tokens, wanted.real
        self._unit = 1.0
        scores = self.measure(images).score
        if scores is not None:
            self._unit = float(np.median(np.abs(scores))) or 1.0

    def __call__(self, images: Tensor) -> Tensor:
        """Images [N, H, W, 3] in [0, 1], or [1, H, W, 3] beside every prompt -> [N]."""
        surprise, score = self._run(images, soft=True)
        if score is None:
            return surprise
        return surprise + PUNISHED * torch.relu(score / self._unit + MARGIN).to(surprise.dtype)

    @torch.no_grad()
    def measure(self, images: Bytes) -> Measured:
        """What the images do to the arm as it is, its gate hard."""
        surprise, score = self._run(torch.tensor(images) / 255, soft=False)
        return Measured(
            surprise.double().numpy(), None if score is None else score.double().numpy()
        )

    def _run(self, images: Tensor, soft: bool) -> tuple[Tensor, Tensor | None]:
        count = len(self._turns)
        prompt = prepare(
            self._vlm, self._batch, self._path.values(images.expand(count, *images.shape[1:]))
        )
        session = Session(self._vlm, prompt, self._arm.spec)
        spec, edits = self._arm.spec, self._arm.edits is not None
        gated = spec is not None and bool(spec.sensors)
        if session.guard is not None and gated and (soft or not edits):
            heard = session.guard.text
            session.guard = SoftGuard(session.guard.spec, prompt.mask, WIDTH * self._unit, edits)
            session.guard.text = heard
        score = None
        with merged(self._vlm, self._arm.tuned), session.guarded():
            hidden = session.feed(prompt.mask.shape[1])[:, -1:]
            if gated and session.guard is not None:
                score = torch.stack(session.guard.scores)[..., -1].amax(0)
            if self._turns.shape[1] > 1:
                hidden = torch.cat([hidden, session.step(self._turns[:, :-1])], 1)
        named = session.logits(hidden).log_softmax(-1).gather(-1, self._turns[..., None])[..., 0]
        return -(named * self._wanted).sum(1) / self._wanted.sum(1), score
