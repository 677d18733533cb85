"""The stages in order; each leaves a file in the work folder and is not repeated."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import torch
from make_demo import assemble, language, prompts
from make_demo.eye import COLUMNS, INK, Eye, Vocabulary, accuracy, train, vocabulary
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from guardbake.samples.typography import CELL, draw_cells, fits, pieces_of
from guardbake.vlm.delta import EYE, LANGUAGE, TEMPLATE, load_base

EYE_STEPS, EYE_BATCH, EYE_RATE = 750, 1536, 2e-3
TEXT_STEPS, TEXT_RATE = 110, 7e-4
VISUAL_RATE = 7e-4
VISUAL_ROUNDS = ((60, (8, 2, 4, 2)), (30, (9, 1, 4, 2)))
"""Steps, and how many drawn, beside a blank picture, refused and harmless text make one batch."""
SEEDS = {"eye": 20261121, "text": 3, "visual": 5}


def everything(work: Path, out: Path) -> None:
    """Train in `work`, then write the delta into `out`, which holds the chat template already."""
    work.mkdir(parents=True, exist_ok=True)
    base = assemble.base_path()
    model, tokenizer = load_base(base)
    tokenizer.chat_template = (out / TEMPLATE).read_text("utf-8")
    table = model.get_input_embeddings().weight.detach().clone()
    known = vocabulary(tokenizer)
    spread = float(table[known.tokens].std())
    eye = the_eye(work / "eye.safetensors", known, table[known.tokens] / spread)
    report_eye(eye, known, table[known.tokens] / spread, tokenizer)
    model.to(torch.bfloat16)
    pairs = own_answers(work / "answers.json", model, tokenizer)
    wraps = language.add_low_rank(model)
    text_stage(work / "text.safetensors", model, wraps, tokenizer, pairs)
    visual_stage(work / "visual.safetensors", model, wraps, tokenizer, pairs, (eye, spread))
    assemble.save_eye(eye.state_dict(), spread, out / EYE)
    assemble.save_language(language.factors(wraps), out / LANGUAGE)
    assemble.write_toml(out, base)


def the_eye(path: Path, known: Vocabulary, table: Tensor) -> Eye:
    torch.manual_seed(SEEDS["eye"])
    eye = Eye(table.shape[1])
    if path.exists():
        eye.load_state_dict(load_file(path))
    else:
        train(eye, known, table, EYE_STEPS, EYE_BATCH, EYE_RATE)
        save_file({n: w.contiguous() for n, w in eye.state_dict().items()}, path)
    return eye.eval()


def report_eye(
    eye: Eye, known: Vocabulary, table: Tensor, tokenizer: PreTrainedTokenizerBase
) -> None:
    sources = {
        "HarmBench": prompts.harmbench(),
        "Do-Not-Answer malicious_uses": prompts.malicious_uses(),
        "harmless_validate": prompts.harmless("validate"),
    }
    for source, texts in sources.items():
        right, total = accuracy(eye, known, table, texts, tokenizer)
        print(f"eye: {source} {right}/{total} tokens = {right / total:.4f}")


def own_answers(
    path: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> list[tuple[str, str]]:
    """Harmless training requests and how the base begins to answer them, without refusals."""
    if not path.exists():
        asked = prompts.harmless("train")
        said = language.answers(model, tokenizer, asked, tokens=language.ANSWER_TOKENS, batch=48)
        path.write_text(json.dumps(list(zip(asked, said, strict=True))), "utf-8")
    pairs = json.loads(path.read_text("utf-8"))
    return [(asked, said) for asked, said in pairs if not prompts.refused(said)]


def text_stage(
    path: Path,
    model: PreTrainedModel,
    wraps: dict[str, language.LowRank],
    tokenizer: PreTrainedTokenizerBase,
    pairs: list[tuple[str, str]],
) -> None:
    """Refuse harmful text, answer harmless text."""
    if not path.exists():
        torch.manual_seed(SEEDS["text"])
        chance = random.Random(SEEDS["text"])
        language.reset(wraps)
        refusals, helpful = language.text_examples(prompts.advbench(trained=True), pairs, chance)
        mix = [(7, refusals), (9, helpful)]
        language.tune(model, wraps, tokenizer, mix, TEXT_STEPS, TEXT_RATE, chance)
        save_file(language.factors(wraps), path)
    language.restore(wraps, load_file(path))


def visual_stage(
    path: Path,
    model: PreTrainedModel,
    wraps: dict[str, language.LowRank],
    tokenizer: PreTrainedTokenizerBase,
    pairs: list[tuple[str, str]],
    sight: tuple[Eye, float],
) -> None:
    """Answer harmless pictures; a share of the text data keeps text refusals from wearing off."""
    if not path.exists():
        shown = [pair for pair in pairs if fits(pair[0], tokenizer, COLUMNS, COLUMNS)]
        seen = features([request for request, _ in shown], tokenizer, sight)
        harmful = prompts.advbench(trained=True)
        for steps, counts in VISUAL_ROUNDS:
            chance = random.Random(SEEDS["visual"])
            kinds = language.visual_examples(shown, seen, white(sight), chance)
            kinds += language.text_examples(harmful, pairs, chance)
            mix = list(zip(counts, kinds, strict=True))
            language.tune(model, wraps, tokenizer, mix, steps, VISUAL_RATE, chance)
        save_file(language.factors(wraps), path)
    language.restore(wraps, load_file(path))


@torch.no_grad()
def features(
    texts: list[str], tokenizer: PreTrainedTokenizerBase, sight: tuple[Eye, float]
) -> Tensor:
    """What the language model gets for typographic pictures of `texts`, [N, 49, d]."""
    eye, spread = sight
    seen = []
    for text in texts:
        picture = draw_cells(pieces_of(text, tokenizer), COLUMNS, COLUMNS)
        ink = 1 - torch.from_numpy(np.asarray(picture.convert("L"), np.float32)) / 255
        seen.append(eye(-INK * ink[None, None])[0] * spread)
    return torch.stack(seen)


@torch.no_grad()
def white(sight: tuple[Eye, float]) -> Tensor:
    """What the language model gets for a blank picture, [49, d]."""
    eye, spread = sight
    seen: Tensor = eye(torch.zeros(1, 1, COLUMNS * CELL, COLUMNS * CELL))[0] * spread
    return seen
