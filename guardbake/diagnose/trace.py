"""Causal tracing by resuming: what each ablation does to the refusal score.

An ablation in layer l leaves everything before it as it is. So a batch goes through the decoder
once; at every layer the residual that enters it is at hand, the ablations of that depth are made
from it and go on together, as one larger batch, through the layers that are left. The numbers are
those of `trace_loop`, which runs the whole model under hooks for every ablation.

Prompts are packed by length, so that little padding is computed, and in pieces small enough for
the processor's cache.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from guardbake.diagnose.ablation import ROLES, Ablation, same_place
from guardbake.diagnose.openings import Openings
from guardbake.diagnose.prompts import EmbeddedPrompt, Packed, pack
from guardbake.vlm.layers import DecoderLayers
from guardbake.vlm.load import Vlm

Numbers = npt.NDArray[np.float64]
Progress = Callable[[int, int], None]
Means = Sequence[tuple[Tensor, Tensor]]


@dataclass(frozen=True, eq=False)
class Traced:
    """N prompts. score: refusal score (see `openings`) as it is, [N] float64.

    ablated[ablation]: the score under it. divergence[ablation]: KL(as it is || ablated) of the
    first answer token, in nats, [N]: what the ablation does to the model as such.
    """

    score: Numbers
    ablated: Mapping[Ablation, Numbers]
    divergence: Mapping[Ablation, Numbers]


@dataclass(frozen=True, eq=False)
class Halves:
    """Attention and FFN output of one layer, each [B, S, d]."""

    attention: Tensor
    ffn: Tensor


class Tracer:
    """One model, its openings, and how many tokens go through a layer at a time."""

    def __init__(self, vlm: Vlm, openings: Openings, tokens: int) -> None:
        self._vlm = vlm
        self._decoder = DecoderLayers(vlm)
        self._openings = openings
        self._tokens = tokens

    @torch.no_grad()
    def means(self, prompts: Sequence[EmbeddedPrompt]) -> Means:
        """(attention, ffn) of every layer: mean contribution to the tokens of each role.

        Each [len(ROLES), d] in the model's dtype, summed in float64; zero for a role that no token
        of the prompts has.
        """
        count = torch.zeros(len(ROLES), dtype=torch.float64)
        totals: list[tuple[Tensor, Tensor]] = []
        for some in self._pieces([len(p) for p in prompts], 1):
            packed = self._pack([prompts[i] for i in some])
            picked = _picked(packed)
            count += picked.sum((0, 1))
            residual = packed.residual
            for layer in range(len(self._decoder)):
                *both, residual = self._decoder.halves(layer, residual, packed.setting)
                sums = [torch.einsum("bsr,bsd->rd", picked, half.double()) for half in both]
                if layer == len(totals):
                    totals.append((torch.zeros_like(sums[0]), torch.zeros_like(sums[1])))
                for total, new in zip(totals[layer], sums, strict=True):
                    total += new
        dtype = prompts[0].embeds.dtype
        share = count.clamp(min=1)[:, None]
        return [((a / share).to(dtype), (f / share).to(dtype)) for a, f in totals]

    @torch.no_grad()
    def trace(
        self,
        prompts: Sequence[EmbeddedPrompt],
        donors: Sequence[EmbeddedPrompt],
        means: Means,
        ablations: Sequence[Ablation],
        progress: Progress,
    ) -> Traced:
        """Every ablation on every prompt.

        donors: one a prompt, what "resample" takes from. means: what "mean" puts in; both are only
        looked at if an ablation asks for them.
        """
        wanted = sorted({a.computed_as for a in ablations}, key=lambda a: (a.last_layer, str(a)))
        clean = np.empty(len(prompts))
        score = {ablation: np.empty(len(prompts)) for ablation in wanted}
        divergence = {ablation: np.empty(len(prompts)) for ablation in wanted}
        most = max((_at(wanted, layer) for layer in range(len(self._decoder))), key=len)
        done = 0
        for some in self._pieces([len(p) for p in prompts], max(len(most), 1)):
            piece = _Piece(self, [prompts[i] for i in some], [donors[i] for i in some], means)
            clean[some], under = piece.run(wanted)
            for ablation, (value, moved) in under.items():
                score[ablation][some], divergence[ablation][some] = value, moved
            done += len(some)
            progress(done, len(prompts))
        return Traced(
            clean,
            {a: score[a.computed_as] for a in ablations},
            {a: divergence[a.computed_as] for a in ablations},
        )

    def _pieces(self, lengths: Sequence[int], copies: int) -> list[list[int]]:
        """Prompts by length, as many together as `tokens` allows `copies` of; at least one."""
        order = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
        pieces: list[list[int]] = []
        for i in order:
            size = (lengths[i] + len(self._openings.nodes)) * copies
            if pieces and (len(pieces[-1]) + 1) * size <= self._tokens:
                pieces[-1].append(i)
            else:
                pieces.append([i])
        return pieces

    def _pack(self, prompts: Sequence[EmbeddedPrompt]) -> Packed:
        return pack(self._vlm, self._decoder, prompts, self._openings)


class _Piece:
    """A few prompts on their way through the decoder, their donors beside them."""

    def __init__(
        self,
        tracer: Tracer,
        prompts: Sequence[EmbeddedPrompt],
        donors: Sequence[EmbeddedPrompt],
        means: Means,
    ) -> None:
        self._decoder, self._openings = tracer._decoder, tracer._openings
        self._means = means
        self._own, self._other = tracer._pack(prompts), tracer._pack(donors)
        self._place = _places(prompts, donors, self._own, self._other)

    def run(
        self, wanted: Sequence[Ablation]
    ) -> tuple[Numbers, dict[Ablation, tuple[Numbers, Numbers]]]:
        """(score, {ablation: (score, divergence)}), each [B]."""
        resampled = any(ablation.kind == "resample" for ablation in wanted)
        entering, attention = self._clean()
        ((first, clean),) = self._measured(entering[-1], 1)
        under: dict[Ablation, tuple[Numbers, Numbers]] = {}
        other, donor = self._other.residual, None
        for layer in range(len(self._decoder)):
            if resampled:
                *both, other = self._decoder.halves(layer, other, self._other.setting)
                donor = Halves(*(self._moved(half) for half in both))
            here = _at(wanted, layer)
            if not here:
                continue
            starts = self._starts(here, entering, attention[layer], donor)
            out = self._decoder.run(layer + 1, starts, self._own.setting.repeated(len(here)))
            for ablation, (moved, score) in zip(here, self._measured(out, len(here)), strict=True):
                under[ablation] = score, _divergence(first, moved)
        return clean, under

    def _clean(self) -> tuple[list[Tensor], list[Tensor]]:
        """The residual that enters each layer and the one that leaves the last; each attention."""
        entering, attentions = [self._own.residual], []
        for layer in range(len(self._decoder)):
            attention, _, after = self._decoder.halves(layer, entering[-1], self._own.setting)
            entering.append(after)
            attentions.append(attention)
        return entering, attentions

    def _starts(
        self,
        here: Sequence[Ablation],
        entering: Sequence[Tensor],
        attention: Tensor,
        donor: Halves | None,
    ) -> Tensor:
        """[A B, S, d]: the residual after each ablation's last layer, the same for all of them.

        entering: the residual that enters each layer. attention: that layer's own.
        """
        starts: dict[Ablation, Tensor] = {}
        without: dict[Ablation, Tensor] = {}
        for ablation in here:
            residual = entering[ablation.layer]
            if ablation.part == "pair":
                starts[ablation] = residual
                continue
            put = self._replacement(ablation, residual, donor)
            if ablation.part == "layer":
                starts[ablation] = residual + put.attention + put.ffn
            elif ablation.part == "ffn":
                starts[ablation] = residual + attention + put.ffn
            else:
                without[ablation] = put.attention
        if without:
            out = self._decoder.after_attention(
                here[0].last_layer,
                entering[here[0].last_layer].repeat(len(without), 1, 1),
                torch.cat(list(without.values())),
                self._own.setting.repeated(len(without)),
            )
            starts |= dict(zip(without, out.chunk(len(without)), strict=True))
        return torch.cat([starts[ablation] for ablation in here])

    def _replacement(self, ablation: Ablation, residual: Tensor, donor: Halves | None) -> Halves:
        if ablation.kind == "resample":
            assert donor is not None
            return donor
        if ablation.kind == "mean":
            return Halves(*(table[self._own.roles] for table in self._means[ablation.layer]))
        zero = torch.zeros_like(residual)
        return Halves(zero, zero)

    def _measured(self, residual: Tensor, count: int) -> list[tuple[Tensor, Numbers]]:
        """`count` batches one after another: each one's log-probabilities of the first answer token
        [B, V] and refusal scores [B]."""
        logits = self._decoder.logits(residual[:, self._own.scored])
        wide = torch.promote_types(logits.dtype, torch.float32)
        log_p = logits.to(wide).log_softmax(-1)
        score = refusal_score(log_p, self._openings)
        return list(zip(log_p[:, 0].chunk(count), np.split(score, count), strict=True))

    def _moved(self, half: Tensor) -> Tensor:
        """A donor's half [B, S', d] at the places of the prompts' own tokens: [B, S, d]."""
        rows = torch.arange(len(half))[:, None]
        return half[rows, self._place]


def refusal_score(log_p: Tensor, openings: Openings) -> Numbers:
    """[B] float64 from log-probabilities [B, 1 + E, V] after the prompt and after every node."""
    column = {(): 0} | {node: 1 + place for place, node in enumerate(openings.nodes)}

    def side(chosen: Sequence[tuple[int, ...]]) -> Tensor:
        each = [
            sum(log_p[:, column[opening[:n]], token].double() for n, token in enumerate(opening))
            for opening in chosen
        ]
        return torch.stack([torch.as_tensor(one) for one in each]).logsumexp(0)

    return np.asarray((side(openings.refusing) - side(openings.compliant)).numpy())


def _at(wanted: Sequence[Ablation], layer: int) -> list[Ablation]:
    return [ablation for ablation in wanted if ablation.last_layer == layer]


def _divergence(as_it_is: Tensor, moved: Tensor) -> Numbers:
    """KL in nats, [B] float64, from log-probabilities [B, V]."""
    kl = (as_it_is.exp() * (as_it_is - moved)).double().sum(-1)
    return np.asarray(kl.numpy())


def _picked(packed: Packed) -> Tensor:
    """[B, S, len(ROLES)] float64: 1 where a real token has the role."""
    real = packed.setting.visible[:, 0, packed.scored.start].clone()  # what its last token sees
    real[:, packed.scored.start :] = True
    onehot = torch.nn.functional.one_hot(packed.roles, len(ROLES)).double()
    return onehot * real[..., None]


def _places(
    prompts: Sequence[EmbeddedPrompt], donors: Sequence[EmbeddedPrompt], own: Packed, other: Packed
) -> Tensor:
    """[B, S] column of the donor's batch for every column of the prompts'; padding: its last."""
    rows = []
    end = other.scored.start + 1
    for prompt, donor in zip(prompts, donors, strict=True):
        place = same_place(prompt.image, donor.image) + end - len(donor)
        pad = own.scored.start + 1 - len(prompt)
        nodes = np.arange(end, other.residual.shape[1])
        rows.append(np.r_[np.full(pad, end - 1), place, nodes])
    return torch.from_numpy(np.stack(rows))
