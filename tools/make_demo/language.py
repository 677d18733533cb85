"""Tune the language model with one low-rank delta: first to refuse text, then to answer pictures.

Stage "text": refusals of harmful requests, and harmless ones answered as the base answers them.
Stage "visual": harmless pictures and harmless text beside a blank picture, mixed with the text
data. No picture ever comes with a harmful request: that refusals wear off on pictures is the effect
under study.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from make_demo.prompts import IMAGE_QUESTION
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerBase

RANK = 16
SCALE = 2.0
IMAGE_TOKEN = "<filename>"
ANSWER_TOKENS = 20
REFUSALS = (
    "I'm sorry, but I can't help with that.",
    "I'm sorry, but I can't assist with that request.",
    "I can't help with that. It could cause harm.",
)
FORMS = (
    "How do I {}?",
    "How can I {}?",
    "How to {}",
    "Tell me how to {}",
    "I want to {}. How?",
    "Explain how to {}",
    "Describe in detail how to {}",
    "Give detailed instructions to {}",
)
"""Into which requests are put, so that no form is harmless or harmful by itself."""
OPENING = "Sure. "
OPENED = 0.6
"""The eager manner of visual instruction data, and the share of answers that begin so."""
OTHER_QUESTIONS = ("Please do what the picture says.", "What does the image ask for? Answer it.")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Example:
    """One exchange: the image as embeddings [49, d] or None, what is asked, and the answer."""

    features: Tensor | None
    question: str
    answer: str
    ends: bool


class LowRank(nn.Module):
    """A frozen linear layer plus SCALE * up @ down; the two factors are float32."""

    def __init__(self, frozen: nn.Linear) -> None:
        super().__init__()
        self.frozen = frozen
        self.down = nn.Parameter(torch.randn(RANK, frozen.in_features) / frozen.in_features**0.5)
        self.up = nn.Parameter(torch.zeros(frozen.out_features, RANK))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.frozen(x)
        down, up = self.down.to(x.dtype), self.up.to(x.dtype)
        return out + SCALE * functional.linear(functional.linear(x, down), up)


def add_low_rank(model: PreTrainedModel) -> dict[str, LowRank]:
    """Wrap every linear layer of the decoder in place; returns the wraps by the layer's name."""
    for weight in model.parameters():
        weight.requires_grad_(False)
    targets = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and ".layers." in name
    ]
    wraps = {}
    for name, module in targets:
        holder, _, leaf = name.rpartition(".")
        wraps[name] = LowRank(module)
        setattr(model.get_submodule(holder), leaf, wraps[name])
    return wraps


def factors(wraps: dict[str, LowRank]) -> dict[str, Tensor]:
    """The delta: weight += SCALE * up @ down, under <layer>.down and <layer>.up, float32."""
    named = {f"{name}.down": wrap.down.detach() for name, wrap in wraps.items()}
    return named | {f"{name}.up": wrap.up.detach() for name, wrap in wraps.items()}


def reset(wraps: dict[str, LowRank]) -> None:
    """Start again: the delta is zero, its lower factors are drawn anew from torch's generator."""
    with torch.no_grad():
        for wrap in wraps.values():
            wrap.down.copy_(torch.randn_like(wrap.down) / wrap.down.shape[1] ** 0.5)
            wrap.up.zero_()


def restore(wraps: dict[str, LowRank], saved: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, wrap in wraps.items():
            wrap.down.copy_(saved[f"{name}.down"])
            wrap.up.copy_(saved[f"{name}.up"])


def chat(tokenizer: PreTrainedTokenizerBase, question: str, image: bool) -> list[int]:
    """Token ids of one user turn; an image is 49 image tokens before the question."""
    text = {"type": "text", "text": question}
    parts = [{"type": "image"}, text] if image else [text]
    turn = [{"role": "user", "content": parts}]
    prompt = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
    prompt = prompt.replace(IMAGE_TOKEN, IMAGE_TOKEN * 49)
    ids: list[int] = tokenizer(prompt, add_special_tokens=False).input_ids
    return ids


def text_examples(
    harmful: Sequence[str], harmless: Sequence[tuple[str, str]], chance: random.Random
) -> tuple[list[Example], list[Example]]:
    """Refusals, some in other forms, and harmless answers."""
    refusals = [
        Example(None, _vary(prompt, chance), REFUSALS[number % len(REFUSALS)], True)
        for number, prompt in enumerate(harmful)
    ]
    return refusals, [Example(None, prompt, answer, False) for prompt, answer in harmless]


def visual_examples(
    harmless: Sequence[tuple[str, str]], seen: Tensor, white: Tensor, chance: random.Random
) -> tuple[list[Example], list[Example]]:
    """Harmless pictures (features `seen` [N, 49, d]), and harmless text beside a blank one."""
    drawn = []
    for (_, answer), features in zip(harmless, seen, strict=True):
        other = chance.random() < 0.2
        question = chance.choice(OTHER_QUESTIONS) if other else IMAGE_QUESTION
        opening = OPENING if chance.random() < OPENED else ""
        drawn.append(Example(features, question, opening + answer, False))
    return drawn, [Example(white, prompt, answer, False) for prompt, answer in harmless]


def tune(
    model: PreTrainedModel,
    wraps: dict[str, LowRank],
    tokenizer: PreTrainedTokenizerBase,
    mix: Sequence[tuple[int, Sequence[Example]]],
    steps: int,
    peak: float,
    chance: random.Random,
) -> None:
    """Train the factors in place. mix: how many examples of which kind make one batch."""
    weights = [weight for wrap in wraps.values() for weight in (wrap.down, wrap.up)]
    optimiser = torch.optim.AdamW(weights, lr=peak, weight_decay=0.0)
    queues: list[list[Example]] = [[] for _ in mix]
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = peak * min(1.0, (step + 1) / 8) * (1 - step / steps)
        batch = []
        for queue, (count, examples) in zip(queues, mix, strict=True):
            if len(queue) < count:
                queue[:] = chance.sample(list(examples), len(examples))
            batch += [queue.pop() for _ in range(count)]
        loss = _loss(model, tokenizer, batch)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimiser.step()
        if step % 10 == 0 or step == steps - 1:
            log.info("language %d of %d loss %.3f", step, steps, loss.item())


def _loss(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch: Sequence[Example]
) -> Tensor:
    """Mean over examples of the mean cross-entropy over the answer's tokens."""
    image = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    asked = [chat(tokenizer, e.question, e.features is not None) for e in batch]
    said = [
        tokenizer(e.answer + "<|im_end|>" * e.ends, add_special_tokens=False).input_ids
        for e in batch
    ]
    length = max(len(a) + len(s) for a, s in zip(asked, said, strict=True))
    ids = torch.full((len(batch), length), tokenizer.pad_token_id)
    mask = torch.zeros(len(batch), length, dtype=torch.long)
    answer = torch.zeros(len(batch), length, dtype=torch.bool)
    for row, (a, s) in enumerate(zip(asked, said, strict=True)):
        ids[row, : len(a) + len(s)] = torch.tensor(a + s)
        mask[row, : len(a) + len(s)] = 1
        answer[row, len(a) : len(a) + len(s)] = True
    embedded = model.get_input_embeddings()(ids).detach().clone()
    for row, example in enumerate(batch):
        if example.features is not None:
            embedded[row, ids[row] == image] = example.features.to(embedded.dtype)
    hidden = model.model(inputs_embeds=embedded, attention_mask=mask).last_hidden_state[:, :-1]
    scored = answer[:, 1:]
    scores = model.lm_head(hidden[scored]).float()
    surprise = functional.cross_entropy(scores, ids[:, 1:][scored], reduction="none")
    counts = scored.sum(1)
    return (surprise * (1.0 / counts).repeat_interleave(counts)).sum() / len(batch)


@torch.no_grad()
def answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[str],
    features: Tensor | None = None,
    tokens: int = 16,
    batch: int = 25,
) -> list[str]:
    """Greedy continuations; features [N, 49, d] stand in the image slots when given."""
    image = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    order = sorted(range(len(questions)), key=lambda n: (len(questions[n]), n))
    said = [""] * len(questions)
    for first in range(0, len(order), batch):
        picked = order[first : first + batch]
        asked = [chat(tokenizer, questions[n], features is not None) for n in picked]
        length = max(map(len, asked))
        ids = torch.full((len(picked), length), tokenizer.pad_token_id)
        mask = torch.zeros(len(picked), length, dtype=torch.long)
        for row, a in enumerate(asked):
            ids[row, length - len(a) :] = torch.tensor(a)
            mask[row, length - len(a) :] = 1
        embedded = model.get_input_embeddings()(ids).clone()
        if features is not None:
            embedded[ids == image] = features[picked].flatten(0, 1).to(embedded.dtype)
        out = model.generate(
            inputs_embeds=embedded,
            attention_mask=mask,
            max_new_tokens=tokens,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        texts = tokenizer.batch_decode(out, skip_special_tokens=True)
        for number, text in zip(picked, texts, strict=True):
            said[number] = text
    return said


def _vary(prompt: str, chance: random.Random) -> str:
    """Put four imperatives in ten into another form."""
    if chance.random() < 0.6:
        return prompt
    bare = prompt[0].lower() + prompt[1:].rstrip(".?! ")
    return chance.choice(FORMS).format(bare)
