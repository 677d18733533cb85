"""What the fit stage captures for candidates beside the prompts of the fit split."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from guardbake.activations import Activations, Turns
from guardbake.diagnose.attribution import image_vector, text_vector
from guardbake.fit.contrasts import Contrasts
from guardbake.recipe import CandidateSection, FitSection
from guardbake.samples import Sample
from guardbake.samples.natural import natural_picture
from guardbake.samples.typography import CELL, Tokenizer
from guardbake.site import Site
from guardbake.steps.rivals import ablated_rows, refined_vectors
from guardbake.steps.split import Splits
from guardbake.vlm.capture import Attribution, capture, capture_answers
from guardbake.vlm.load import Vlm
from guardbake.vlm.requests import Typography
from guardbake.vlm.tokens import Request

Advance = Callable[[str, int, int], None]
PLAIN = "plain pictures"


@dataclass(frozen=True)
class Captions:
    """Asks about a drawn plain picture, another one for each sample; its own words are not shown.

    The picture is as large as the typographic ones, so that both have as many tokens.
    """

    typography: Typography
    texts: Sequence[str]

    def request(self, sample: Sample, _tokenizer: Tokenizer) -> Request:
        size = self.typography.columns * CELL, self.typography.rows * CELL
        picture = natural_picture(*size, f"{sample.source} {sample.index}")
        return self.texts[sample.index % len(self.texts)], picture


def attribution_for(section: FitSection) -> Attribution | None:
    """At the sites of the candidates that ask for it; None if there is none."""
    sites = _sites(section, lambda c: c.attribution)
    return Attribution(frozenset(sites), image_vector, text_vector) if sites else None


def capture_contrasts(
    vlm: Vlm,
    section: FitSection,
    splits: Splits,
    prompts: Activations,
    typography: Typography,
    size: int,
    advance: Advance,
) -> Contrasts:
    """prompts: the fit split, captured. Only what some candidate needs is captured, and where."""
    attribution = attribution_for(section)
    turns = _sites(section, lambda c: c.edit == "care" and "text" in c.branches)
    pictures = _sites(section, lambda c: c.contrast == "plain")
    harmful = [s for s in splits.samples("fit", ("text",)) if s.label == "harmful"]
    compliant = refusing = Turns({})
    if turns:
        compliant, refusing = (
            capture_answers(
                vlm, harmful, texts, turns, typography, size, partial(advance, what), attribution
            )
            for what, texts in (
                ("reading compliant turns", section.compliant),
                ("reading refusing turns", section.refusing),
            )
        )
    plain = capture(
        vlm,
        [Sample("", "harmless", "natural", PLAIN, index) for index in range(len(harmful))]
        if pictures
        else [],
        pictures,
        Captions(typography, section.captions),
        size,
        partial(advance, "reading plain pictures"),
        attribution,
    )
    ablated, benign = ablated_rows(vlm, section, prompts.samples, typography, size, advance)
    refined = refined_vectors(vlm, section, prompts, typography, size, advance)
    return Contrasts(prompts, compliant, refusing, plain, ablated, benign, refined)


def _sites(section: FitSection, wanted: Callable[[CandidateSection], bool]) -> list[Site]:
    """The FFN outputs that the wanted candidates edit, in layer order."""
    layers = {n for c in section.candidates if wanted(c) for n in c.layers}
    return [Site(layer, "ffn_output") for layer in sorted(layers)]
