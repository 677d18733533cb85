"""Capture activations in float32 at chosen sites; the hooks live inside one context manager."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from guardbake.activations import Activations, Rows
from guardbake.batch import Batch
from guardbake.samples import Sample
from guardbake.site import Site
from guardbake.vlm.load import Vlm
from guardbake.vlm.reference import on_site
from guardbake.vlm.requests import Typography, batches
from guardbake.vlm.runner import Session, prepare

Progress = Callable[[int, int], None]


def every_site(vlm: Vlm) -> list[Site]:
    """Both boundaries of every decoder layer, in the order data passes them."""
    layers = vlm.model.get_submodule(vlm.family.layers)
    assert isinstance(layers, nn.ModuleList)
    return [
        site
        for layer in range(len(layers))
        for site in (Site(layer, "ffn_output"), Site(layer, "residual"))
    ]


def capture(
    vlm: Vlm,
    samples: Sequence[Sample],
    sites: Sequence[Site],
    typography: Typography,
    batch_size: int,
    progress: Progress,
) -> Activations:
    """Run every sample's prompt once and keep its row at each site (see `Activations`)."""
    last: dict[Site, list[Rows]] = {site: [] for site in sites}
    means: dict[Site, list[Rows]] = {site: [] for site in sites}
    done = 0
    for some, batch in batches(vlm, samples, typography, batch_size):
        for site, tensor in _prompt_tensors(vlm, batch, sites).items():
            last[site].append(tensor[:, -1].numpy())
            means[site].append(_image_mean(tensor, batch))
        done += len(some)
        progress(done, len(samples))
    return Activations(
        list(samples),
        {site: np.concatenate(rows) for site, rows in last.items()},
        {site: np.concatenate(rows) for site, rows in means.items()},
    )


@torch.no_grad()
def capture_answers(
    vlm: Vlm,
    samples: Sequence[Sample],
    answers: Sequence[str],
    sites: Sequence[Site],
    typography: Typography,
    batch_size: int,
    progress: Progress,
) -> dict[Site, Rows]:
    """Mean row [N, d] a sample over the tokens of an assistant turn that it did not write itself.

    Sample i is answered with answers[i % len(answers)]; the answers are cut to the shortest one's
    length in tokens. CARE's text subspace contrasts compliant with refusing turns (METHODS 2).
    """
    encode = vlm.processor.tokenizer
    turns = [encode(text, add_special_tokens=False)["input_ids"] for text in answers]
    length = min(len(turn) for turn in turns)
    table = torch.tensor([turn[:length] for turn in turns])
    rows: dict[Site, list[Rows]] = {site: [] for site in sites}
    done = 0
    for some, batch in batches(vlm, samples, typography, batch_size):
        session = Session(vlm, prepare(vlm, batch), None)
        session.feed(batch.input_ids.shape[1])
        chosen = table[[(done + row) % len(table) for row in range(len(some))]]
        for site, tensor in recorded(vlm, sites, partial(session.step, chosen)).items():
            rows[site].append(tensor.mean(1).numpy())
        done += len(some)
        progress(done, len(samples))
    return {site: np.concatenate(parts) for site, parts in rows.items()}


@torch.no_grad()
def _prompt_tensors(vlm: Vlm, batch: Batch, sites: Sequence[Site]) -> dict[Site, Tensor]:
    session = Session(vlm, prepare(vlm, batch), None)
    return recorded(vlm, sites, lambda: session.feed(batch.input_ids.shape[1]))


def recorded(vlm: Vlm, sites: Sequence[Site], call: Callable[[], object]) -> dict[Site, Tensor]:
    """Each site's tensor [B, S, d] float32 during `call`."""
    layers = vlm.model.get_submodule(vlm.family.layers)
    assert isinstance(layers, nn.ModuleList)
    seen: dict[Site, Tensor] = {}

    def keep(site: Site) -> Callable[[Tensor], None]:
        def see(tensor: Tensor) -> None:
            seen[site] = tensor.float()

        return see

    with ExitStack() as stack:
        for site in sites:
            stack.enter_context(on_site(layers, vlm.family.feed_forward, site, keep(site)))
        call()
    return seen


def _image_mean(tensor: Tensor, batch: Batch) -> Rows:
    """Mean over image tokens, [B, d]; NaN where a row has none."""
    mask = torch.from_numpy(batch.image_mask)[..., None]
    total = torch.where(mask, tensor, 0).sum(1)
    return np.asarray((total / mask.sum(1)).numpy())
