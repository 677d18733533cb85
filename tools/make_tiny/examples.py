"""From requests to training examples and batches, in the three forms of the project.

text: the request as text. blank: the same with a white image. typographic: the request drawn in the
image, and the text only says to answer it. A picture is 16 word numbers; -1 is a white cell.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from guardbake.samples.typography import blank, draw_piece, pieces_of

from make_tiny.families import IMAGE_TOKENS, SIDE, Family
from make_tiny.grammar import INSTRUCTION, Request, words

FORMS = ("text", "blank", "typographic")
WHITE = -1


@dataclass(frozen=True)
class Example:
    """Token numbers of the prompt and of the answer with its end mark, and the picture, if any."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    cells: tuple[int, ...] | None
    first_slot: int | None
    """Where the 16 image positions start; without cells they hold the picture's words as tokens."""


class Sketchbook:
    """Makes examples of one family; holds every word's cell as the processor sees it."""

    def __init__(self, family: Family, noise: torch.Generator) -> None:
        self.family = family
        self.drawable = [word for word in words() if word.isalpha()]
        self._numbers = {word: number for number, word in enumerate(self.drawable)}
        images = [draw_piece(word) for word in self.drawable] + [blank(1, 1)]
        self._pixels = torch.stack([self._cell(image) for image in images])
        self._noise = noise
        self._prompt_ids = lru_cache(maxsize=None)(self._encode)

    def word_ids(self) -> Tensor:
        """[words + 1] int64: the token of each drawable word, then <unk> for white."""
        convert = self.family.processor.tokenizer.convert_tokens_to_ids
        return torch.tensor([convert(word) for word in [*self.drawable, "<unk>"]])

    def cells(self, text: str) -> tuple[int, ...]:
        """The picture of `text`: its pieces in reading order, then white cells."""
        pieces = pieces_of(text, self.family.processor.tokenizer)
        drawn = [self._numbers[piece] for piece in pieces]
        return tuple(drawn + [WHITE] * (IMAGE_TOKENS - len(drawn)))

    def of_request(self, request: Request, form: str, answer: str) -> Example:
        """`request` in one of the three forms."""
        if form == "typographic":
            return self.example(INSTRUCTION, answer, self.cells(request.text))
        white = (WHITE,) * IMAGE_TOKENS
        return self.example(request.text, answer, white if form == "blank" else None)

    def example(self, text: str, answer: str, cells: tuple[int, ...] | None) -> Example:
        tokenizer = self.family.processor.tokenizer
        ids = (*tokenizer(answer)["input_ids"], self.family.eos_token_id)
        prompt = self._prompt_ids(text, cells is not None)
        slot = prompt.index(self.family.image_token_id) if cells is not None else None
        return Example(prompt, ids, cells, slot)

    def spelled(self, example: Example) -> Example:
        """The same example with the words of its picture as tokens in the image positions."""
        if example.cells is None or example.first_slot is None:
            return example
        words, start = self.word_ids()[list(example.cells)].tolist(), example.first_slot
        prompt = (*example.prompt[:start], *words, *example.prompt[start + IMAGE_TOKENS :])
        return replace(example, prompt=prompt, cells=None)

    def pixels(self, pictures: Sequence[Sequence[int]], noisy: bool) -> dict[str, Tensor]:
        """The model's image arguments; noisy: less contrast and Gaussian noise on the pixels."""
        values = self._pixels[torch.tensor(pictures)]
        if noisy:
            gain = 0.85 + 0.15 * torch.rand((len(values),) + (1,) * 5, generator=self._noise)
            values = 1 - gain * (1 - values)
            values = values + 0.08 * torch.randn(values.shape, generator=self._noise)
        if self.family.merged:
            return {"pixel_values": values.flatten(0, 2).flatten(1)}
        rows = values.reshape(-1, 4, 4, 3, 48, 48).permute(0, 3, 1, 4, 2, 5)
        return {"pixel_values": rows.reshape(len(values), 3, SIDE, SIDE)}

    def batch(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """Model arguments for training: right-padded, the loss on the answers only."""
        length = max(len(e.prompt) + len(e.answer) for e in examples)
        ids = torch.zeros(len(examples), length, dtype=torch.long)
        labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
        for row, e in enumerate(examples):
            whole = torch.tensor(e.prompt + e.answer)
            ids[row, : len(whole)] = whole
            mask[row, : len(whole)] = 1
            labels[row, len(e.prompt) : len(whole)] = whole[len(e.prompt) :]
        arguments = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        pictures = [e.cells for e in examples if e.cells is not None]
        if pictures:
            arguments |= self.pixels(pictures, noisy=True)
        if self.family.merged:
            arguments |= _grid_arguments(examples, length)
        return arguments

    def _cell(self, image: Any) -> Tensor:
        """One cell after the processor: [1, 3, 48, 48], or [4, 3456, 1, 1] for merged patches."""
        processor = self.family.processor.image_processor
        if self.family.merged:
            rows = processor(image, return_tensors="np")["pixel_values"]
            return torch.as_tensor(rows)[:, :, None, None]
        return torch.as_tensor(
            processor(image, do_resize=False, return_tensors="np")["pixel_values"]
        )

    def _encode(self, text: str, with_image: bool) -> tuple[int, ...]:
        content = [{"type": "image"}] * with_image + [{"type": "text", "text": text}]
        processor = self.family.processor
        turn = [{"role": "user", "content": content}]
        line = processor.apply_chat_template(turn, add_generation_prompt=True)
        token = processor.image_token
        return tuple(processor.tokenizer(line.replace(token, token * IMAGE_TOKENS))["input_ids"])


def grid(pictures: int) -> Tensor:
    """[pictures, 3] int64: Qwen's frames, rows and columns of patches of every picture."""
    return torch.tensor([[1, 8, 8]] * pictures)


def _grid_arguments(examples: Sequence[Example], length: int) -> dict[str, Tensor]:
    """What Qwen's rotary positions need: which tokens stand in a picture, and its grid."""
    kinds, pictures = torch.zeros(len(examples), length, dtype=torch.int), 0
    for row, example in enumerate(examples):
        if example.first_slot is not None:
            kinds[row, example.first_slot : example.first_slot + IMAGE_TOKENS] = 1
            pictures += 1
    shown = {"image_grid_thw": grid(pictures)} if pictures else {}
    return {"mm_token_type_ids": kinds, **shown}
