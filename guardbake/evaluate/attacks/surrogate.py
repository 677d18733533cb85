"""A guard whose gate a gradient can pass, for attacks that know the guard.

The hard gate has no slope, so an attacker puts a smooth one in its place (Athalye et al. 2018,
arXiv 1802.00420): every edit is blended in by sigmoid(score / width). Sensor and edits are the
reference's own. Attacks search with this guard; what they found is judged with the real one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from guardbake.spec import GuardSpec
from guardbake.vlm.reference import TorchGuard


class SoftGuard(TorchGuard):
    """A gated guard on a prompt fed whole, then on forced tokens, with a gradient throughout.

    prompt [B, T]: the prompt's attention mask, left-padded. width: of the sigmoid, in units of the
    score. edits: whether there are any; without them the guard only senses.
    """

    def __init__(self, spec: GuardSpec, prompt: Tensor, width: float, edits: bool) -> None:
        super().__init__(spec, -prompt.sum(1))
        self._columns = prompt.shape[1]
        self._width = width
        self._editing = edits
        self._verdicts: dict[int, Tensor] = {}

    def where_open(self, gate: int, edited: Tensor, y: Tensor) -> Tensor:
        """The blend of `edited` and y wherever an open gate would have put `edited`."""
        if not self._editing:
            return y
        touched = self.attention_mask[:, -y.shape[1] :].to(y.dtype)
        if self.spec.profile == "token":
            opened = torch.sigmoid(self.scores[gate] / self._width)
        else:
            if self.attention_mask.shape[1] == self._columns:
                self._verdicts[gate] = self.scores[gate][:, -1:]
                touched = torch.zeros_like(touched)
                touched[:, -1] = 1  # of the prompt its last token alone
            opened = torch.sigmoid(self._verdicts[gate] / self._width)
        return y + (touched * opened.to(y.dtype))[..., None] * (edited - y)
