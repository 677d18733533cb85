"""From samples to what a VLM is asked: the text and, by form, an image beside it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from guardbake.batch import Batch
from guardbake.samples import Sample
from guardbake.samples.natural import natural_picture
from guardbake.samples.pictures import open_picture
from guardbake.samples.typography import (
    CELL,
    Tokenizer,
    blank,
    clean,
    draw_cells,
    fits,
    pieces_of,
)
from guardbake.vlm.load import Vlm
from guardbake.vlm.tokens import Request, collate


class Asking(Protocol):
    """How a model is asked for what a sample holds."""

    def request(self, sample: Sample, tokenizer: Tokenizer) -> Request:
        """(text, image or None) for one sample."""
        ...


@dataclass(frozen=True)
class Typography:
    """How requests are drawn: columns x rows cells, and what the text beside the image says."""

    columns: int
    rows: int
    instruction: str

    def request(self, sample: Sample, tokenizer: Tokenizer) -> Request:
        """Every drawn form uses the same cleaned words; a natural picture goes by them.

        Form "image" is asked as it was published: its own words, its own picture.
        """
        if sample.image is not None:
            return sample.prompt, open_picture(sample.image, f"{sample.source} [{sample.index}]")
        words = clean(sample.prompt)
        if sample.form == "text":
            return words, None
        if sample.form == "blank":
            return words, blank(self.columns, self.rows)
        if sample.form == "natural":
            return words, natural_picture(self.columns * CELL, self.rows * CELL, words)
        drawn = draw_cells(pieces_of(words, tokenizer), self.columns, self.rows)
        return self.instruction, drawn


def drawable(prompt: str, typography: Typography, tokenizer: Tokenizer) -> bool:
    """Whether the prompt can be shown in every form."""
    return bool(clean(prompt)) and fits(prompt, tokenizer, typography.columns, typography.rows)


def collated(vlm: Vlm, requests: Sequence[Request]) -> Batch:
    """`tokens.collate` as the model's family is asked."""
    return collate(vlm.processor, vlm.image_token_id, requests, vlm.family.prompt)


def batches(
    vlm: Vlm, samples: Sequence[Sample], asking: Asking, size: int
) -> Iterator[tuple[Sequence[Sample], Batch]]:
    """The samples in order, `size` at a time, collated."""
    for start in range(0, len(samples), size):
        some = samples[start : start + size]
        requests = [asking.request(s, vlm.processor.tokenizer) for s in some]
        yield some, collated(vlm, requests)
