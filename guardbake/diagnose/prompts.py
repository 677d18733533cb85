"""Prompts as a trace works on them: embedded once, without padding, packed by length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from guardbake.diagnose.ablation import ANSWER, Flags, roles
from guardbake.diagnose.openings import Openings
from guardbake.samples import Sample
from guardbake.vlm.layers import DecoderLayers, Setting
from guardbake.vlm.load import Vlm
from guardbake.vlm.prompt import prepare
from guardbake.vlm.requests import Asking, batches


@dataclass(frozen=True, eq=False)
class EmbeddedPrompt:
    """embeds [T, d], positions [T] or [3, T], image [T] bool: True at image tokens."""

    embeds: Tensor
    positions: Tensor
    image: Flags

    def __len__(self) -> int:
        return len(self.embeds)


@dataclass(frozen=True, eq=False)
class Packed:
    """B prompts, left-padded to T columns, each followed by the E nodes of the openings.

    residual [B, T + E, d] enters layer 0. roles [B, T + E] int64 (any number at padding).
    scored: the columns whose logits are wanted, the prompt's last and the nodes.
    """

    residual: Tensor
    setting: Setting
    roles: Tensor
    scored: slice


@torch.no_grad()
def embed_prompts(
    vlm: Vlm, samples: Sequence[Sample], asking: Asking, batch_size: int
) -> list[EmbeddedPrompt]:
    """One a sample, in order."""
    out = []
    for some, batch in batches(vlm, samples, asking, batch_size):
        prompt = prepare(vlm, batch)
        for row in range(len(some)):
            real = prompt.mask[row].bool()
            image = batch.image_mask[row][real.numpy()]
            positions = prompt.positions[..., row, real]
            out.append(EmbeddedPrompt(prompt.embeds[row][real], positions, image))
    return out


def pack(
    vlm: Vlm, decoder: DecoderLayers, prompts: Sequence[EmbeddedPrompt], openings: Openings
) -> Packed:
    """The prompts in one batch. A node sees its prompt, the nodes it continues, and itself; its
    position is the one it would have in an answer of its own."""
    nodes = openings.nodes
    longest, extra = max(len(prompt) for prompt in prompts), len(nodes)
    tails = vlm.model.get_input_embeddings()(torch.tensor([n[-1] for n in nodes], dtype=torch.long))
    depth = torch.tensor([len(node) for node in nodes], dtype=torch.long)
    embeds, positions, role, real = [], [], [], []
    for prompt in prompts:
        pad = longest - len(prompt)
        embeds.append(torch.cat([tails.new_zeros(pad, tails.shape[-1]), prompt.embeds, tails]))
        own = prompt.positions
        after = own.max() + depth.expand(*own.shape[:-1], extra)
        positions.append(torch.cat([own.new_zeros(*own.shape[:-1], pad), own, after], -1))
        role.append(np.r_[np.zeros(pad, np.int64), roles(prompt.image), [ANSWER] * extra])
        real.append([False] * pad + [True] * len(prompt))
    visible = _visible(torch.tensor(real), openings)
    residual = torch.stack(embeds)
    setting = decoder.setting(residual, torch.stack(positions, -2), visible)
    columns = slice(longest - 1, longest + extra)
    return Packed(residual, setting, torch.from_numpy(np.stack(role)), columns)


def _visible(real: Tensor, openings: Openings) -> Tensor:
    """[B, S, S] bool from the real prompt columns [B, T]; padding sees itself alone."""
    nodes = openings.nodes
    batch, length = real.shape
    size = length + len(nodes)
    seen = torch.zeros(batch, size, size, dtype=torch.bool)
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    seen[:, :length, :length] = causal & real[:, None]
    seen[:, length:, :length] = real[:, None]
    for row, node in enumerate(nodes):
        for column, other in enumerate(nodes):
            seen[:, length + row, length + column] = node[: len(other)] == other
    return seen | torch.eye(size, dtype=torch.bool)
