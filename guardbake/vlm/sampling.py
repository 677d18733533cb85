"""Sampled answers that depend on nothing but the seed and the request.

Every request draws from a generator of its own, so neither the batch nor the arm changes its
numbers: two guards that leave a distribution alone leave its sampled answers alone, and what a
paired test counts is the guard's doing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from guardbake.samples import Sample
from guardbake.vlm.runner import Pick


@dataclass(frozen=True)
class Sampling:
    """Nucleus sampling (Holtzman et al. 2020, arXiv 1904.09751): the smallest set of likeliest
    tokens whose probability at `temperature` reaches `top_p`, renormalised."""

    seed: int
    temperature: float
    top_p: float

    def pick(self, samples: Sequence[Sample], steps: int) -> Pick:
        """Chooses for these requests, at most `steps` times each."""
        drawn = torch.stack([_uniform(self.seed, sample, steps) for sample in samples])

        def choose(logits: Tensor, step: int) -> Tensor:
            return nucleus(logits / self.temperature, self.top_p, drawn[:, step])

        return choose


def nucleus(logits: Tensor, top_p: float, uniform: Tensor) -> Tensor:
    """The token [B] at which the cumulative probability passes `uniform` [B], in [0, 1).

    logits [B, V]; tokens are taken in order of probability, ties in order of their ids.
    """
    chances, order = logits.double().softmax(-1).sort(dim=-1, descending=True, stable=True)
    total = chances.cumsum(-1)
    inside = total - chances < top_p
    reached = torch.where(inside, total, 0).amax(-1, keepdim=True)
    place = (total <= uniform[:, None] * reached).sum(-1, keepdim=True)
    return order.gather(-1, place.clamp(max=order.shape[-1] - 1))[:, 0]


def _uniform(seed: int, sample: Sample, steps: int) -> Tensor:
    name = f"{seed}:{sample.form}:{sample.family}:{sample.source}:{sample.index}"
    digest = hashlib.sha256(name.encode()).digest()
    own = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    return torch.rand(steps, generator=own, dtype=torch.float64)
