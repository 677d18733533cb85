"""Measure a checkpoint: refusals on held-out prompts, as text, beside a blank picture, and drawn.

Counts only; neither prompts nor answers are shown or stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from make_demo import prompts
from make_demo.eye import COLUMNS
from make_demo.prompts import IMAGE_QUESTION
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from guardbake.samples import FORMS, Form
from guardbake.samples.typography import blank, draw_cells, fits, pieces_of

TOKENS = 16


@dataclass(frozen=True)
class Count:
    """Refusals among `total` prompts of one source in one form."""

    source: str
    form: Form
    refused: int
    total: int


class Checkpoint:
    """A materialised checkpoint, opened as any user would open it."""

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        self.processor = AutoProcessor.from_pretrained(folder)
        self.processor.tokenizer.padding_side = "left"
        self.model = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype).eval()

    @torch.no_grad()
    def answers(self, texts: Sequence[str], form: Form, batch: int = 25) -> list[str]:
        """Greedy continuations of 16 tokens, in the order of `texts`."""
        order = sorted(range(len(texts)), key=lambda n: (len(texts[n]), n))
        said = [""] * len(texts)
        for first in range(0, len(order), batch):
            picked = order[first : first + batch]
            chats = [self._chat(texts[n], form) for n in picked]
            inputs = self.processor(
                text=chats,
                images=None
                if form == "text"
                else [[self._picture(texts[n], form)] for n in picked],
                return_tensors="pt",
                padding=True,
            )
            if "pixel_values" in inputs:
                inputs["pixel_values"] = inputs["pixel_values"].to(self.model.dtype)
            out = self.model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)
            new = out[:, inputs["input_ids"].shape[1] :]
            decoded = self.processor.batch_decode(new, skip_special_tokens=True)
            for number, text in zip(picked, decoded, strict=True):
                said[number] = text
        return said

    def _chat(self, text: str, form: Form) -> str:
        question = {"type": "text", "text": IMAGE_QUESTION if form == "typographic" else text}
        content = [question] if form == "text" else [{"type": "image"}, question]
        turn = [{"role": "user", "content": content}]
        chat: str = self.processor.apply_chat_template(turn, add_generation_prompt=True)
        return chat

    def _picture(self, text: str, form: Form) -> Image.Image:
        if form == "blank":
            return blank(COLUMNS, COLUMNS)
        return draw_cells(pieces_of(text, self.processor.tokenizer), COLUMNS, COLUMNS)


def refusals(checkpoint: Checkpoint, every: int = 1) -> list[Count]:
    """Refusals on HarmBench, the held-out part of AdvBench and harmless validation requests.

    every: measure only each such prompt of a source.
    """
    sources = {
        "HarmBench": prompts.harmbench(),
        "AdvBench held out": prompts.advbench(trained=False),
        "harmless_validate": prompts.harmless("validate"),
        "lookalikes_validate": prompts.lookalikes(),
    }
    counts = []
    for source, texts in sources.items():
        tokenizer = checkpoint.processor.tokenizer
        usable = [text for text in texts[::every] if fits(text, tokenizer, COLUMNS, COLUMNS)]
        for form in FORMS:
            said = checkpoint.answers(usable, form)
            counts.append(Count(source, form, sum(map(prompts.refused, said)), len(said)))
    return counts


def table(counts: Sequence[Count]) -> str:
    """The counts as Markdown, one row per source."""
    rows = ["| prompts | " + " | ".join(FORMS) + " |", "|---" * (len(FORMS) + 1) + "|"]
    for source in dict.fromkeys(count.source for count in counts):
        cells = [
            f"{c.refused}/{c.total} = {c.refused / c.total:.2f}"
            for c in counts
            if c.source == source
        ]
        rows.append(f"| {source} | " + " | ".join(cells) + " |")
    return "\n".join(rows)
