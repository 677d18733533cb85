"""Which image tokens make a model comply, and what they do to a tensor: ASTRA's measurements.

An image token is ablated by putting a white picture's token, at the same place, in its own place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from guardbake.activations import Rows
from guardbake.errors import UsageError
from guardbake.samples import Sample
from guardbake.site import Site
from guardbake.vlm.capture import recorded
from guardbake.vlm.forced import Ids, forced
from guardbake.vlm.load import Vlm
from guardbake.vlm.prompt import Prompt, prepare
from guardbake.vlm.requests import Asking, batches, collated
from guardbake.vlm.runner import Session

Progress = Callable[[int, int], None]
Flags = npt.NDArray[np.bool_]
Choose = Callable[[Flags, npt.NDArray[np.float64]], Flags]
LIKELIEST = -1e-6  # ln p beyond which a logit is rounding in float32


@dataclass(frozen=True)
class Ablation:
    """times: random ablations a picture. kept: chance of a token to stay. seed: of the draws, the
    same for every picture. choose(kept [times, n] bool, scores [times]) -> [n] bool, the tokens
    that carry the compliance."""

    times: int
    kept: float
    seed: int
    choose: Choose


@torch.no_grad()
def capture_ablated(
    vlm: Vlm,
    samples: Sequence[Sample],
    turns: Sequence[Ids],
    sites: Sequence[Site],
    asking: Asking,
    batch_size: int,
    ablation: Ablation,
    progress: Progress,
) -> dict[Site, Rows]:
    """At the last prompt token, whole picture minus the same without the tokens chosen, [N, d].

    Scored is sample i's compliant turn turns[i % len(turns)], by the mean over its tokens of
    ln p - ln(1 - p). A sample of which no token is chosen leaves no row. Raises UsageError for a
    sample without a picture.
    """
    rows: dict[Site, list[Rows]] = {site: [] for site in sites}
    for number, sample in enumerate(samples):
        whole, empty = _with_and_without(vlm, sample, asking)
        draws = np.random.default_rng(ablation.seed)
        kept = draws.random((ablation.times, int(whole.image.sum()))) < ablation.kept
        turn = turns[number % len(turns)]
        scores = _scores(vlm, whole, empty, kept, turn, batch_size)
        chosen = ablation.choose(kept, scores)
        if chosen.any():
            both = np.stack([np.ones_like(chosen), ~chosen])
            session = Session(vlm, _mixed(whole, empty, both), None)
            seen = recorded(vlm, sites, partial(session.feed, whole.mask.shape[1]))
            for site, tensor in seen.items():
                rows[site].append((tensor[0, -1] - tensor[1, -1]).numpy())
        progress(number + 1, len(samples))
    return {site: np.stack(parts) for site, parts in rows.items() if parts}


@torch.no_grad()
def capture_turns(
    vlm: Vlm,
    samples: Sequence[Sample],
    turns: Sequence[Ids],
    sites: Sequence[Site],
    asking: Asking,
    batch_size: int,
    progress: Progress,
) -> dict[Site, Rows]:
    """Mean over the tokens of turns[i], said after sample i, at each site, [N, d]."""
    rows: dict[Site, list[Rows]] = {site: [] for site in sites}
    done = 0
    for some, batch in batches(vlm, samples, asking, batch_size):
        said = forced(turns[done : done + len(some)])
        session = Session(vlm, prepare(vlm, batch), None)
        session.feed(batch.input_ids.shape[1])
        weights = (said.real / said.real.sum(1, keepdim=True))[..., None]
        for site, tensor in recorded(vlm, sites, partial(session.step, said.tokens)).items():
            rows[site].append((tensor * weights).sum(1).numpy())
        done += len(some)
        progress(done, len(samples))
    return {site: np.concatenate(parts) for site, parts in rows.items() if parts}


def _with_and_without(vlm: Vlm, sample: Sample, asking: Asking) -> tuple[Prompt, Prompt]:
    """The prompt with its picture and with a white one, a batch of one each."""
    text, picture = asking.request(sample, vlm.processor.tokenizer)
    if picture is None:
        raise UsageError(
            found=f"{sample.source} [{sample.index}] without a picture",
            expected="a picture whose tokens can be ablated",
            where="ASTRA's image attribution",
            remedy="give samples in a form that has pictures",
        )
    white = Image.new("RGB", picture.size, "white")
    whole, empty = (collated(vlm, [(text, p)]) for p in (picture, white))
    return prepare(vlm, whole), prepare(vlm, empty)


def _scores(
    vlm: Vlm, whole: Prompt, empty: Prompt, kept: Flags, turn: Ids, batch_size: int
) -> npt.NDArray[np.float64]:
    parts = []
    for start in range(0, len(kept), batch_size):
        some = kept[start : start + batch_size]
        session = Session(vlm, _mixed(whole, empty, some), None)
        logs = -forced([turn] * len(some)).surprise(session).double()
        parts.append((logs - torch.log(-torch.expm1(logs.clamp(max=LIKELIEST)))).mean(1))
    return np.asarray(torch.cat(parts).numpy())


def _mixed(whole: Prompt, empty: Prompt, kept: Flags) -> Prompt:
    """One row for each of kept [B, n]: the whole picture's tokens where it is true."""
    count = len(kept)
    stays = torch.ones(count, whole.image.shape[1], dtype=torch.bool)
    stays[:, whole.image[0]] = torch.from_numpy(kept)
    return replace(
        whole,
        embeds=torch.where(stays[..., None], whole.embeds, empty.embeds),
        deepstack=_either(stays, whole.deepstack, empty.deepstack),
        positions=whole.positions.expand(*whole.positions.shape[:-2], count, -1),
        mask=whole.mask.expand(count, -1),
        image=whole.image.expand(count, -1),
        mutual=None if whole.mutual is None else whole.mutual.expand(count, -1),
    )


def _either(stays: Tensor, whole: Tensor | None, empty: Tensor | None) -> Tensor | None:
    """Deepstack features [levels, B, T, d], if any: the whole picture's where it stays."""
    if whole is None or empty is None:
        return None
    return torch.where(stays[None, ..., None], whole, empty)
