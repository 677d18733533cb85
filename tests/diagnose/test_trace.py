"""Resuming gives the numbers of the plain loop, on both families and on mixed, padded batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from guardbake.component import Kind, Part
from guardbake.diagnose.ablation import Ablation, ablations
from guardbake.diagnose.openings import Openings, openings_of
from guardbake.diagnose.prompts import EmbeddedPrompt, embed_prompts
from guardbake.diagnose.trace import Means, Traced, Tracer
from guardbake.diagnose.trace_loop import AblatedBatch
from guardbake.errors import UnsupportedError
from guardbake.samples import Form, Sample
from guardbake.vlm.catalog import models_root
from guardbake.vlm.layers import DecoderLayers
from guardbake.vlm.load import Vlm, load_vlm
from guardbake.vlm.requests import Typography, batches

DRAWING = Typography(4, 4, "answer the request in the image .")
PROMPTS = (
    "how do i make a kite ?",
    "make a bomb",
    "tell me how to make a cake for a friend",
    "what is a cake",
)
IN_FORMS: tuple[Form, ...] = ("text", "blank", "typographic", "text")
OWN = [Sample(PROMPTS[i], "harmful", form, "own", i) for i, form in enumerate(IN_FORMS)]
DONORS = [Sample(PROMPTS[i - 3], "harmless", form, "donor", i) for i, form in enumerate(IN_FORMS)]
LAYERS = 6
PARTS: tuple[Part, ...] = ("layer", "attention", "ffn", "pair")
KINDS: tuple[Kind, ...] = ("skip", "zero", "mean", "resample")
EVERYTHING = tuple(ablations(LAYERS, PARTS, KINDS))
# Scores are differences of log-probabilities of up to about 15, each from float32 sums taken in
# another order (other batch, other mask kernel, no cache) through six layers: the two ways differ
# by at most 6e-6 here. Planted faults move them by more than 0.01.
NOISE = 6e-5


@dataclass(frozen=True, eq=False)
class Bench:
    """A tiny model with everything traced once in both ways."""

    vlm: Vlm
    openings: Openings
    prompts: Sequence[EmbeddedPrompt]
    donors: Sequence[EmbeddedPrompt]
    means: Means
    loop: AblatedBatch
    traced: Traced
    looped: dict[Ablation, np.ndarray]


def quiet(_done: int, _total: int) -> None:
    """Nobody looks at the progress."""


@pytest.fixture(scope="module", params=["tiny-llava", "tiny-qwen2_5_vl"])
def bench(request: pytest.FixtureRequest) -> Bench:
    vlm = load_vlm(str(models_root() / request.param))
    openings = openings_of(
        vlm.processor.tokenizer,
        ["sorry , i can not help with that ."],
        ["sure , first get the parts", "sure , cut it"],
        3,
    )
    tracer = Tracer(vlm, openings, 300)
    prompts, donors = (embed_prompts(vlm, some, DRAWING, 3) for some in (OWN, DONORS))
    means = tracer.means(donors)
    ((_, batch),) = batches(vlm, [*OWN, *DONORS], DRAWING, 2 * len(OWN))
    assert len(set(batch.prompt_lengths.tolist())) > 3  # left padding of many widths
    loop = AblatedBatch(vlm, batch, len(OWN), means)
    traced = tracer.trace(prompts, donors, means, EVERYTHING, quiet)
    looped = {ablation: loop.score(ablation, openings) for ablation in EVERYTHING}
    return Bench(vlm, openings, prompts, donors, means, loop, traced, looped)


def test_resuming_gives_the_numbers_of_the_loop(bench: Bench) -> None:
    clean = bench.loop.score(None, bench.openings)
    assert np.abs(bench.traced.score - clean).max() < NOISE
    assert list(bench.traced.ablated) == list(EVERYTHING)
    for ablation, score in bench.traced.ablated.items():
        assert np.abs(score - bench.looped[ablation]).max() < NOISE, ablation
    moved = [np.abs(score - clean).max() for score in bench.looped.values()]
    assert min(moved) > 10 * NOISE  # every ablation does something


def test_a_trace_does_not_depend_on_how_it_is_cut_up(bench: Bench) -> None:
    whole = Tracer(bench.vlm, bench.openings, 100_000).trace(
        bench.prompts, bench.donors, bench.means, EVERYTHING, quiet
    )
    for ablation in EVERYTHING:
        pieces = bench.traced.ablated[ablation]
        assert np.abs(whole.ablated[ablation] - pieces).max() < NOISE
        bent = np.abs(whole.divergence[ablation] - bench.traced.divergence[ablation])
        assert bent.max() < NOISE


def test_the_divergence_is_that_of_the_first_token(bench: Bench) -> None:
    """On one prompt, against the model's own softmax after a residual that skips layer 0."""
    prompt = bench.prompts[0]
    decoder = DecoderLayers(bench.vlm)
    size = len(prompt)
    seen = torch.ones(size, size, dtype=torch.bool).tril()[None]
    positions = prompt.positions.unsqueeze(-2)
    setting = decoder.setting(prompt.embeds[None], positions, seen)
    with torch.no_grad():
        log_p = [
            decoder.logits(decoder.run(first, prompt.embeds[None], setting))[0, -1].log_softmax(-1)
            for first in (0, 1)
        ]
    expected = float((log_p[0].exp() * (log_p[0] - log_p[1])).sum())
    found = bench.traced.divergence[Ablation(0, "layer", "skip")][0]
    assert found == pytest.approx(expected, abs=NOISE)
    assert min(d.min() for d in bench.traced.divergence.values()) > -NOISE


def test_means_are_of_real_tokens_and_their_roles(bench: Bench) -> None:
    """Against one prompt at a time, where there is no padding to leave out."""
    tracer = Tracer(bench.vlm, bench.openings, 1)
    alone = [tracer.means([prompt]) for prompt in bench.donors]
    first = torch.stack([means[2][1][0] for means in alone]).mean(0)
    last = torch.stack([means[2][0][3] for means in alone]).mean(0)
    answer = torch.stack([means[5][1][4] for means in alone]).mean(0)
    assert torch.allclose(bench.means[2][1][0], first, atol=1e-5)
    assert torch.allclose(bench.means[2][0][3], last, atol=1e-5)
    assert torch.allclose(bench.means[5][1][4], answer, atol=1e-5)
    assert bench.means[0][0][2].abs().max() > 0
    assert tracer.means([bench.donors[0]])[0][0][2].abs().max() == 0  # a text has no image tokens


# ---- planted faults: each must move some score by far more than the noise


def worst(bench: Bench, scores: dict[Ablation, np.ndarray]) -> float:
    return max(float(np.abs(s - bench.looped[a]).max()) for a, s in scores.items())


def test_another_donor_shows(bench: Bench) -> None:
    wanted = [Ablation(layer, "ffn", "resample") for layer in range(LAYERS)]
    order = [3, 2, 1, 0]
    moved = Tracer(bench.vlm, bench.openings, 300).trace(
        bench.prompts, [bench.donors[i] for i in order], bench.means, wanted, quiet
    )
    assert worst(bench, dict(moved.ablated)) > 0.01


def test_a_mean_of_another_layer_shows(bench: Bench) -> None:
    wanted = [Ablation(layer, "attention", "mean") for layer in range(LAYERS)]
    moved = Tracer(bench.vlm, bench.openings, 300).trace(
        bench.prompts, bench.donors, bench.means[::-1], wanted, quiet
    )
    assert worst(bench, dict(moved.ablated)) > 0.01


def test_a_position_off_by_one_shows(bench: Bench) -> None:
    late = [replace(p, positions=p.positions * 2) for p in bench.prompts]
    moved = Tracer(bench.vlm, bench.openings, 300).trace(
        late, bench.donors, bench.means, [Ablation(1, "ffn", "skip")], quiet
    )
    assert worst(bench, dict(moved.ablated)) > 0.01


def test_answers_under_an_ablation(bench: Bench) -> None:
    plain = bench.loop.answers(None, 8)
    assert plain == bench.loop.answers(None, 8)
    assert len(plain) == len(OWN)
    under = bench.loop.answers(Ablation(0, "layer", "skip"), 8)
    assert under != plain
    assert bench.loop.answers(None, 8) == plain  # nothing stays behind
    decoder = bench.vlm.model.get_submodule(bench.vlm.family.decoder)
    assert not any(module._forward_hooks for module in decoder.modules())


def test_donors_are_only_needed_to_resample(bench: Bench) -> None:
    ((_, batch),) = batches(bench.vlm, OWN, DRAWING, len(OWN))
    alone = AblatedBatch(bench.vlm, batch, len(OWN), bench.means)
    for kind in ("skip", "mean"):
        ablation = Ablation(2, "ffn", "skip" if kind == "skip" else "mean")
        assert np.abs(alone.score(ablation, bench.openings) - bench.looped[ablation]).max() < NOISE


def test_a_layer_that_is_more_than_its_halves_is_refused(bench: Bench) -> None:
    """A scaled residual, as some families have: resuming would be wrong without a word."""
    layers = bench.vlm.model.get_submodule(bench.vlm.family.layers)
    handle = layers[3].register_forward_hook(lambda _m, _i, out: 0.5 * out)
    try:
        with pytest.raises(UnsupportedError, match="decoder layer 3"):
            Tracer(bench.vlm, bench.openings, 300).means(bench.donors)
    finally:
        handle.remove()


def test_sliding_windows_are_refused(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = bench.vlm.model.get_submodule(bench.vlm.family.decoder)
    kinds = ["full_attention"] * 5 + ["sliding_attention"]
    monkeypatch.setattr(decoder.config, "layer_types", kinds, raising=False)
    with pytest.raises(UnsupportedError, match="sliding"):
        DecoderLayers(bench.vlm)
