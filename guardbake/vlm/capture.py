"""Capture activations in float32 at chosen sites; the hooks live inside one context manager."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from guardbake.activations import Activations, Parts, Rows, Turns
from guardbake.batch import Batch
from guardbake.samples import Sample
from guardbake.site import Site
from guardbake.vlm.load import Vlm
from guardbake.vlm.prompt import prepare
from guardbake.vlm.reference import on_site
from guardbake.vlm.requests import Asking, batches
from guardbake.vlm.runner import Session

Flags = npt.NDArray[np.bool_]
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Attribution:
    """How a sample's tokens become one vector, and at which sites that is wanted.

    image(tokens [T, d] float32, image mask [T], text mask [T]) and text(tokens, text mask) give
    [d] float32: the functions of `diagnose.attribution`, which lies behind this room.
    """

    sites: Collection[Site]
    image: Callable[[Rows, Flags, Flags], Rows]
    text: Callable[[Rows, Flags], Rows]


def every_site(vlm: Vlm) -> list[Site]:
    """Both boundaries of every decoder layer, in the order data passes them."""
    layers = vlm.model.get_submodule(vlm.family.layers)
    assert isinstance(layers, nn.ModuleList)
    return [
        site
        for layer in range(len(layers))
        for site in (Site(layer, "ffn_output"), Site(layer, "residual"))
    ]


class _Enough(Exception):
    """The deepest site was seen: what the layers above it compute is not asked for."""


@torch.no_grad()
def capture(
    vlm: Vlm,
    samples: Sequence[Sample],
    sites: Sequence[Site],
    asking: Asking,
    batch_size: int,
    progress: Progress,
    attribution: Attribution | None = None,
) -> Activations:
    """Run every sample's prompt up to the deepest site and keep its rows at each (see
    `Activations`).

    The tokens of one batch at one site are in memory at a time. attribution: its sites must be
    among `sites`.
    """
    last, means, images, texts = (Parts[Site]() for _ in range(4))
    deepest = max(sites, key=lambda site: site.depth, default=None)
    done = 0
    for some, batch in batches(vlm, samples, asking, batch_size):

        def see(site: Site, tensor: Tensor, batch: Batch = batch) -> None:
            last.add(site, tensor[:, -1].numpy())
            means.add(site, _image_mean(tensor, batch.image_mask))
            if attribution is not None and site in attribution.sites:
                spans = list(zip(tensor.numpy(), batch.image_mask, batch.text_mask, strict=True))
                images.add(site, np.stack([attribution.image(*span) for span in spans]))
                texts.add(site, np.stack([attribution.text(t, words) for t, _, words in spans]))
            if site == deepest:
                raise _Enough

        session = Session(vlm, prepare(vlm, batch), None)
        with watching(vlm, sites, see), suppress(_Enough):
            session.feed(batch.input_ids.shape[1])
        done += len(some)
        progress(done, len(samples))
    return Activations(
        list(samples), last.joined(), means.joined(), images.joined(), texts.joined()
    )


@torch.no_grad()
def capture_answers(
    vlm: Vlm,
    samples: Sequence[Sample],
    answers: Sequence[str],
    sites: Sequence[Site],
    asking: Asking,
    batch_size: int,
    progress: Progress,
    attribution: Attribution | None = None,
) -> Turns:
    """One row a sample over the tokens of an assistant turn that it did not write itself.

    Sample i is answered with answers[i % len(answers)]; the answers are cut to the shortest one's
    length in tokens. CARE's text subspace contrasts compliant with refusing turns (METHODS 2); the
    prompt before them is the same in both and is left out.
    """
    encode = vlm.processor.tokenizer
    turns = [encode(text, add_special_tokens=False)["input_ids"] for text in answers]
    length = min(len(turn) for turn in turns)
    table = torch.tensor([turn[:length] for turn in turns])
    every = np.ones(length, bool)
    means, chosen = Parts[Site](), Parts[Site]()

    def see(site: Site, tensor: Tensor) -> None:
        means.add(site, tensor.mean(1).numpy())
        if attribution is not None and site in attribution.sites:
            chosen.add(site, np.stack([attribution.text(t, every) for t in tensor.numpy()]))

    done = 0
    for some, batch in batches(vlm, samples, asking, batch_size):
        session = Session(vlm, prepare(vlm, batch), None)
        session.feed(batch.input_ids.shape[1])
        turn = table[[(done + row) % len(table) for row in range(len(some))]]
        with watching(vlm, sites, see):
            session.step(turn)
        done += len(some)
        progress(done, len(samples))
    return Turns(means.joined(), chosen.joined())


@contextmanager
def watching(
    vlm: Vlm, sites: Sequence[Site], see: Callable[[Site, Tensor], None]
) -> Iterator[None]:
    """While open, `see` is shown each site's tensor [B, S, d] float32 as a call computes it."""
    layers = vlm.model.get_submodule(vlm.family.layers)
    assert isinstance(layers, nn.ModuleList)

    def shown(site: Site, tensor: Tensor) -> None:
        see(site, tensor.float())

    with ExitStack() as stack:
        for site in sites:
            hook = partial(shown, site)
            stack.enter_context(on_site(layers, vlm.family.feed_forward, site, hook))
        yield


def recorded(vlm: Vlm, sites: Sequence[Site], call: Callable[[], object]) -> dict[Site, Tensor]:
    """Each site's tensor [B, S, d] float32 during `call`."""
    seen: dict[Site, Tensor] = {}
    with watching(vlm, sites, seen.__setitem__):
        call()
    return seen


def _image_mean(tensor: Tensor, image: Flags) -> Rows:
    """Mean over the image tokens [B, T] of [B, T, d]: [B, d], NaN where a row has none."""
    mask = torch.from_numpy(image)[..., None]
    total = torch.where(mask, tensor, 0).sum(1)
    return np.asarray((total / mask.sum(1)).numpy())
