"""Train the eye: a small CLIP-ViT with LLaVA's projector; it turns drawn pieces into embeddings.

Loss: cross-entropy over the nearest token embedding among the vocabulary, plus the squared error;
a blank cell has a filler token as its target. The eye sees one colour channel; the three of the
shipped model are equal.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass

import numpy as np
import torch
from make_demo import prompts
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPVisionConfig, CLIPVisionModel, PreTrainedTokenizerBase

from guardbake.samples.typography import CELL, Piece, cut, draw_piece

COLUMNS = 7
PLACES = COLUMNS * COLUMNS
INK = 2.0
"""Minus the value of black after the image processor: (0 - mean 1.0) / std 0.5."""
FILLER = " "

_WORDS = 2500
_CONTINUATIONS = 500
_SHIFTS = [(down, right) for down in (-1, 0, 1) for right in (-1, 0, 1) if down or right]
_TEMPERATURE = 72.0
_CANDIDATES = 2048

log = logging.getLogger(__name__)


def vision_config() -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=384,
        intermediate_size=1536,
        num_hidden_layers=3,
        num_attention_heads=6,
        image_size=COLUMNS * CELL,
        patch_size=CELL,
        projection_dim=384,
        num_channels=1,
    )


class Eye(nn.Module):
    """A CLIP-ViT that looks at every patch by itself, and LLaVA's projector.

    One cell is one piece, so neighbours and places carry nothing: the output of attention and the
    place embeddings are zero and stay zero, and training can pass single cells through the rest.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.tower = CLIPVisionModel(vision_config())
        hidden = vision_config().hidden_size
        self.linear_1 = nn.Linear(hidden, width)
        self.linear_2 = nn.Linear(width, width)
        unused = [self.tower.embeddings.position_embedding.weight]
        for layer in self.tower.encoder.layers:
            unused += layer.self_attn.out_proj.parameters()
        for weight in unused:
            nn.init.zeros_(weight)

    def trained(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """The matrices inside the network, and everything else that is trained."""
        parts = [self.tower.pre_layrnorm, self.linear_1, self.linear_2]
        for layer in self.tower.encoder.layers:
            parts += [layer.layer_norm2, layer.mlp]
        weights = [weight for part in parts for weight in part.parameters()]
        inner = [w for w in weights if w.ndim == 2 and w is not self.linear_2.weight]
        rest = [w for w in weights if w.ndim == 1]
        kernel = self.tower.embeddings.patch_embedding.weight
        return inner, [*rest, self.linear_2.weight, kernel]

    def project(self, seen: Tensor) -> Tensor:
        out: Tensor = self.linear_2(functional.gelu(self.linear_1(seen)))
        return out

    def cells(self, pixels: Tensor) -> Tensor:
        """Single cells [N, 48, 48] -> standardised token embeddings [N, d], without attention."""
        kernel = self.tower.embeddings.patch_embedding.weight
        state = functional.linear(pixels.flatten(1), kernel.flatten(1))
        state = self.tower.pre_layrnorm(state)
        for layer in self.tower.encoder.layers:
            state = state + layer.mlp(layer.layer_norm2(state))
        return self.project(state)

    def forward(self, pictures: Tensor) -> Tensor:
        """Whole pictures [B, 1, 336, 336] -> standardised token embeddings [B, 49, d]."""
        return self.project(self.tower(pixel_values=pictures).last_hidden_state[:, 1:])


@dataclass(frozen=True)
class Vocabulary:
    """Every piece the eye learns.

    ink: [P, 48, 48] float32 in 0..1, the drawings; row 0 is the blank cell.
    classes: [P] int64, which row of `tokens` a drawing stands for; the blank cell is class 0.
    tokens: [C] int64 ids in the language model.
    common: [P] float32, square root of how often a drawing occurs in the prompt sources.
    """

    ink: Tensor
    classes: Tensor
    tokens: Tensor
    common: Tensor


def vocabulary(tokenizer: PreTrainedTokenizerBase) -> Vocabulary:
    """Pieces of all prompt sources and of the most ordinary words (lowest ids: merged first)."""
    texts = prompts.advbench(trained=True) + prompts.advbench(trained=False)
    texts += prompts.harmbench() + prompts.malicious_uses() + prompts.all_of_ours()
    seen = [piece for text in texts for piece in cut(text, tokenizer)]
    names = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    words = [(n[1:], i) for i, n in enumerate(names) if re.fullmatch("\u0120[A-Za-z]+", n)]
    parts = [("-" + n, i) for i, n in enumerate(names) if re.fullmatch("[a-z]+", n)]
    listed = words[:_WORDS] + parts[:_CONTINUATIONS]
    pieces = sorted(set(seen) | {Piece(*pair) for pair in listed if len(pair[0]) <= 16})
    filler = tokenizer(FILLER, add_special_tokens=False).input_ids[0]
    tokens = [filler, *sorted({piece.token for piece in pieces} - {filler})]
    place = {token: number for number, token in enumerate(tokens)}
    row = {piece: number for number, piece in enumerate(pieces, start=1)}
    ink = [np.zeros((CELL, CELL), np.float32)]
    ink += [1 - np.asarray(draw_piece(p.drawn).convert("L"), np.float32) / 255 for p in pieces]
    return Vocabulary(
        ink=torch.from_numpy(np.stack(ink)),
        classes=torch.tensor([0, *(place[piece.token] for piece in pieces)]),
        tokens=torch.tensor(tokens),
        common=torch.bincount(torch.tensor([row[p] for p in seen]), minlength=len(ink)).sqrt(),
    )


def compose(drawings: Tensor) -> Tensor:
    """Cells [B, 49, 48, 48] -> pictures [B, 1, 336, 336] of the same ink."""
    grid = drawings.reshape(-1, COLUMNS, COLUMNS, CELL, CELL).permute(0, 1, 3, 2, 4)
    return grid.reshape(-1, 1, COLUMNS * CELL, COLUMNS * CELL)


def random_rows(known: Vocabulary, count: int) -> Tensor:
    """Drawings to learn from, [count]: half as frequent as in the sources, half any; some blank."""
    anything = torch.randint(1, len(known.ink), (count,))
    common = torch.multinomial(known.common, count, replacement=True)
    rows = torch.where(torch.rand(count) < 0.5, common, anything)
    rows[: count // 64] = 0
    return rows


def spoil(cells: Tensor) -> Tensor:
    """Shift half of the cells by a pixel, vary the ink, add noise; ink [N, 48, 48] -> pixels."""
    ways = torch.randint(2 * len(_SHIFTS), (len(cells),))
    moved = cells.clone()
    for number, shift in enumerate(_SHIFTS):
        here = ways == number
        moved[here] = torch.roll(cells[here], shift, (1, 2))
    strength = 0.85 + 0.15 * torch.rand(len(cells), 1, 1)
    noise = torch.randn(len(cells), 1, CELL) * torch.randn(len(cells), CELL, 1)
    return -INK * (moved * strength + 0.03 * noise)


def start_from_components(eye: Eye, known: Vocabulary) -> None:
    """Set the patch embedding to the (half whitened) principal components of shifted drawings."""
    picked = known.ink[torch.randperm(len(known.ink))[:6000]]
    shifted = spoil(picked).flatten(1)
    values, vectors = torch.linalg.eigh(shifted.T @ shifted / len(shifted))
    kernel = eye.tower.embeddings.patch_embedding.weight
    count = kernel.shape[0]
    scaled = vectors[:, -count:] * values[-count:].clamp_min(1e-6) ** -0.25
    with torch.no_grad():
        kernel.copy_(scaled.T.reshape(kernel.shape))


def candidates(wanted: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """About 2048 of `count` classes, the wanted ones among them, and where these stand in it."""
    present = torch.zeros(count, dtype=torch.bool)
    present[torch.randperm(count)[:_CANDIDATES]] = True
    present[wanted] = True
    shown = present.nonzero()[:, 0]
    return shown, torch.searchsorted(shown, wanted)


def train(eye: Eye, known: Vocabulary, table: Tensor, steps: int, batch: int, peak: float) -> None:
    """Train `eye` in place towards `table` [C, d], the standardised embeddings of known.tokens."""
    start_from_components(eye, known)
    half_norms = (table**2).sum(1) / 2
    inner, rest = eye.trained()
    optimisers = [
        torch.optim.Muon(inner, lr=peak, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=peak, weight_decay=0.0, betas=(0.9, 0.98)),
    ]
    for step in range(steps):
        rate = peak * min(1.0, (step + 1) / 50) * min(1.0, 0.02 + 1.6 * (1 - step / steps))
        for optimiser in optimisers:
            optimiser.param_groups[0]["lr"] = rate
        rows = random_rows(known, batch)
        wanted = known.classes[rows]
        shown, label = candidates(wanted, len(table))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            guess = eye.cells(spoil(known.ink[rows]))
            scores = guess @ table[shown].T.to(torch.bfloat16)
        surprise = functional.cross_entropy(
            (scores.float() - half_norms[shown]) / _TEMPERATURE, label
        )
        error = ((guess.float() - table[wanted]) ** 2).mean()
        # First tell the pieces apart, then come close to their embeddings.
        loss = surprise + (1 + 9 * step / steps) * error
        loss.backward()
        for optimiser in optimisers:
            optimiser.step()
            optimiser.zero_grad()
        if step % 50 == 0 or step == steps - 1:
            right = (scores.float() - half_norms[shown]).argmax(1) == label
            log.info(
                "eye %d of %d loss %.3f error %.3f right %.3f",
                step, steps, loss.item(), error.item(), right.float().mean().item(),
            )  # fmt: skip


@torch.no_grad()
def accuracy(
    eye: Eye, known: Vocabulary, table: Tensor, texts: list[str], tokenizer: PreTrainedTokenizerBase
) -> tuple[int, int]:
    """Tokens of `texts` read right (nearest embedding in the vocabulary), and all tokens."""
    place = {int(token): number for number, token in enumerate(known.tokens)}
    half_norms = (table**2).sum(1) / 2
    right = total = 0
    for text in texts:
        pieces = cut(text, tokenizer)[:PLACES]
        cells = torch.zeros(1, PLACES, CELL, CELL)
        for number, piece in enumerate(pieces):
            drawn = np.asarray(draw_piece(piece.drawn).convert("L"), np.float32)
            cells[0, number] = 1 - torch.from_numpy(drawn) / 255
        guess = eye(-INK * compose(cells))[0, : len(pieces)].float()
        read = (guess @ table.T - half_norms).argmax(1).tolist()
        right += sum(place.get(p.token, -1) == r for p, r in zip(pieces, read, strict=True))
        total += len(pieces)
    return right, total
