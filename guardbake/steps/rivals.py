"""What ASTRA and SPO-VLM need of the model, measured on the fit split."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from guardbake.activations import Activations, Rows
from guardbake.errors import MalformedError
from guardbake.fit.astra import KEPT, SEED, TIMES, carrying
from guardbake.fit.push import mean_difference_push
from guardbake.recipe import FitSection
from guardbake.samples import Sample
from guardbake.site import Site
from guardbake.steps.exchanges import exchanges, own_answers, some
from guardbake.vlm.forced import turn_ids
from guardbake.vlm.image_ablation import Ablation, capture_ablated, capture_turns
from guardbake.vlm.load import Vlm
from guardbake.vlm.preference import Descent, refine
from guardbake.vlm.requests import Asking

Advance = Callable[[str, int, int], None]
Sites = dict[Site, Rows]

PICTURED = ("typographic", "image")


def ablated_rows(
    vlm: Vlm,
    section: FitSection,
    samples: Sequence[Sample],
    asking: Asking,
    size: int,
    advance: Advance,
) -> tuple[Sites, Sites]:
    """`Contrasts.ablated` and `Contrasts.benign` at the sites of the candidates astra.

    samples: of the fit split. Raises MalformedError without pictures of both labels, and if
    ablating no token of any of them makes the model less compliant.
    """
    layers = {n for c in section.candidates if c.edit == "astra" for n in c.layers}
    if not layers:
        return {}, {}
    sites = [Site(layer, "ffn_output") for layer in sorted(layers)]
    pictured = [sample for sample in samples if sample.form in PICTURED]
    limit = section.rivals.pictures
    harmful, harmless = (some(pictured, label, limit) for label in ("harmful", "harmless"))
    turns = [turn_ids(vlm, text, ends=False) for text in section.compliant]
    plan = Ablation(TIMES, KEPT, SEED, carrying)
    tick = partial(advance, "ablating image tokens")
    moved = capture_ablated(vlm, harmful, turns, sites, asking, size, plan, tick)
    if not moved or not harmless:
        raise MalformedError(
            found=f"{len(harmful)} harmful pictures, none of which hangs on a token"
            if harmful and harmless
            else f"{len(harmful)} harmful and {len(harmless)} harmless pictures",
            expected="pictures of both labels, and compliance that hangs on image tokens",
            where="ASTRA's image attribution",
            remedy="give the fit split more prompts, or leave the candidate out",
        )
    said = own_answers(vlm, harmless, section.tokens, asking, size, advance)
    own = [turn_ids(vlm, text, ends=True) for text in said]
    tick = partial(advance, "reading answers to harmless pictures")
    return moved, capture_turns(vlm, harmless, own, sites, asking, size, tick)


def refined_vectors(
    vlm: Vlm,
    section: FitSection,
    prompts: Activations,
    asking: Asking,
    size: int,
    advance: Advance,
) -> dict[tuple[int, ...], Sites]:
    """`Contrasts.refined` for the candidates spo. prompts: the fit split, captured."""
    groups = [group for c in section.candidates if c.edit == "spo" for group in c.groups]
    if not groups:
        return {}
    rivals = section.rivals
    pairs = exchanges(vlm, section, prompts.samples, rivals.exchanges, asking, size, advance)
    descent = Descent(rivals.steps, rivals.batch, rivals.rate, rivals.seed)
    whole = section.profile == "always"
    if not whole:  # a gate keeps harmless requests from the vectors
        pairs = [pair for pair in pairs if pair.sample.label == "harmful"]
    found: dict[tuple[int, ...], Sites] = {}
    for group in groups:
        start: Mapping[Site, Rows] = {
            edit.site: edit.push
            for edit in (mean_difference_push(prompts, layer) for layer in group)
            if edit.push is not None
        }
        what = f"preferring answers, layers {'+'.join(map(str, group))}"
        found[group] = refine(vlm, pairs, start, whole, asking, descent, partial(advance, what))
    return found
