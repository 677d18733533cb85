"""The schedule: a helpful language model, refusals in text, an eye, then harmless visual tuning."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from make_tiny.examples import WHITE, Example, Sketchbook, grid
from make_tiny.families import IMAGE_TOKENS
from make_tiny.grammar import READ, REFUSAL, Request, Split


@dataclass(frozen=True)
class Schedule:
    """Steps of 32 examples per stage, and the mix of the last one.

    The rest of the mix are harmless pictures to answer (and, for refused_typographic, to refuse).
    """

    helpful: int = 300
    refusals: int = 300
    eye: int = 400
    read: int = 80
    visual: int = 160
    visual_rate: float = 3e-4
    text_share: float = 0.1
    read_share: float = 0.15
    blank_share: float = 0.3
    refused_typographic: float = 0.0


@dataclass
class Trainer:
    """Trains one family on the train split."""

    book: Sketchbook
    split: Split
    schedule: Schedule
    rng: random.Random
    log: Callable[[str], None]
    losses: dict[str, float] = field(default_factory=dict)

    def run(self) -> None:
        """All stages in order; the model of the sketchbook's family is trained in place."""
        s, model = self.schedule, self.book.family.model
        eye = self._parameters(self._is_eye)
        language = self._parameters(lambda name: not self._is_eye(name))
        bridge = self._parameters(lambda n: "multi_modal_projector" in n or "visual.merger" in n)
        self._stage("helpful", s.helpful, language, 2e-3, self._helpful)
        self._stage("refusals", s.refusals, language, 1e-3, self._aligned)
        self._open_eye(s.eye, eye)
        self._stage("read", s.read, eye, 5e-4, self._read_picture)
        self._stage("visual", s.visual, language + bridge, s.visual_rate, self._visual)
        model.requires_grad_(False)

    def _helpful(self) -> Example:
        if self.rng.random() < 0.15:
            return self._read_text()
        request = self._pick(self.split.harmful + self.split.harmless)
        return self.book.of_request(request, "text", request.helpful)

    def _aligned(self) -> Example:
        if self.rng.random() < 0.15:
            return self._read_text()
        return self._text()

    def _text(self) -> Example:
        if self.rng.random() < 0.5:
            return self.book.of_request(self._pick(self.split.harmful), "text", REFUSAL)
        request = self._pick(self.split.harmless)
        return self.book.of_request(request, "text", request.helpful)

    def _read_text(self) -> Example:
        """The words stand where a picture would, so that the model can read them later."""
        shown = [self.rng.choice(self.book.drawable) for _ in range(self.rng.randint(1, 12))]
        return self.book.spelled(self.book.example(READ, " ".join(shown), self._numbers(shown)))

    def _read_picture(self) -> Example:
        shown = [self.rng.choice(self.book.drawable) for _ in range(self.rng.randint(1, 12))]
        if self.rng.random() < 0.5:
            shown = [w for w in self._pick(self.split.harmless).text.split() if w.isalpha()]
        return self.book.example(READ, " ".join(shown), self._numbers(shown))

    def _visual(self) -> Example:
        """The mix of the last stage: harmless pictures, harmless text beside white, text."""
        s = self.schedule
        if self.rng.random() < s.refused_typographic:
            return self.book.of_request(self._pick(self.split.harmful), "typographic", REFUSAL)
        draw = self.rng.random()
        if draw < s.text_share:
            return self._text()
        if draw < s.text_share + s.read_share:
            return self._read_picture()
        request = self._pick(self.split.harmless)
        is_blank = draw < s.text_share + s.read_share + s.blank_share
        form = "blank" if is_blank else "typographic"
        return self.book.of_request(request, form, request.helpful)

    def _stage(
        self,
        name: str,
        steps: int,
        parameters: Sequence[nn.Parameter],
        rate: float,
        draw: Callable[[], Example],
    ) -> None:
        model = self.book.family.model

        def loss() -> Tensor:
            result: Tensor = model(**self.book.batch([draw() for _ in range(32)])).loss
            return result

        self._descend(name, steps, parameters, rate, loss)

    def _open_eye(self, steps: int, parameters: Sequence[nn.Parameter]) -> None:
        """Every cell's feature is drawn to the embedding of the word in it (white: <unk>)."""
        model = self.book.family.model
        table = model.get_input_embeddings().weight.detach()[self.book.word_ids()].clone()
        scale = table.pow(2).sum(1).mean()

        def loss() -> Tensor:
            wanted = torch.tensor([self._scatter() for _ in range(24)])
            found = self._features(wanted.tolist())
            distance = torch.cdist(found, table).pow(2) / scale
            answer = wanted.flatten() % len(table)
            nearest = nn.functional.cross_entropy(-10 * distance, answer)
            result: Tensor = nearest + distance[torch.arange(len(answer)), answer].mean()
            return result

        self._descend("eye", steps, parameters, 2e-3, loss)

    def _features(self, pictures: list[list[int]]) -> Tensor:
        arguments = self.book.pixels(pictures, noisy=True)
        if self.book.family.merged:
            arguments["image_grid_thw"] = grid(len(pictures))
        features = self.book.family.model.get_image_features(**arguments).pooler_output
        return torch.cat([part.flatten(0, -2) for part in features])

    def _scatter(self) -> list[int]:
        """A picture for the eye: words all over, or a line of words and white cells after it."""
        words = len(self.book.drawable)
        count = IMAGE_TOKENS if self.rng.random() < 0.5 else self.rng.randint(0, 12)
        drawn = [self.rng.randrange(words) for _ in range(count)]
        return drawn + [WHITE] * (IMAGE_TOKENS - count)

    def _descend(
        self,
        name: str,
        steps: int,
        parameters: Sequence[nn.Parameter],
        rate: float,
        loss: Callable[[], Tensor],
    ) -> None:
        """AdamW with warm-up over 30 steps and a linear fall to a tenth of `rate`."""
        model, start = self.book.family.model, time.monotonic()
        model.train()
        model.requires_grad_(False)
        for parameter in parameters:
            parameter.requires_grad_(True)
        optimiser = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.01)
        value = torch.tensor(float("nan"))
        for step in range(steps):
            for group in optimiser.param_groups:
                group["lr"] = rate * min(1.0, (step + 1) / 30) * (1 - 0.9 * step / steps)
            value = loss()
            optimiser.zero_grad()
            torch.autograd.backward(value)
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimiser.step()
        model.eval()
        self.losses[name] = round(float(value.detach()), 4)
        self.log(f"{name}: {steps} steps, loss {value:.4f}, {time.monotonic() - start:.0f} s")

    def _parameters(self, wanted: Callable[[str], bool]) -> list[nn.Parameter]:
        named = self.book.family.model.named_parameters()
        return [parameter for name, parameter in named if wanted(name)]

    def _is_eye(self, name: str) -> bool:
        return any(part in name for part in self.book.family.eye)

    def _pick(self, requests: Sequence[Request]) -> Request:
        return self.rng.choice(requests)

    def _numbers(self, shown: Sequence[str]) -> tuple[int, ...]:
        numbers = [self.book.drawable.index(word) for word in shown]
        return tuple(numbers + [WHITE] * (IMAGE_TOKENS - len(numbers)))
