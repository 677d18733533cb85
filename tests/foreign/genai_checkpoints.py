"""Tiny checkpoints of random numbers that onnxruntime-genai can be asked: images between the marks
that it looks for by their spelling, a tokenizer of the kind that it reads, 256 tokens in a Gemma's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from tests.families.checkpoints import MAKERS, STOCK, save_random

FAMILIES = ("gemma3", "qwen2_5_vl", "qwen2_vl", "qwen3_vl")
QWEN = "<|vision_start|>", "<|image_pad|>", "<|vision_end|>"
GEMMA = "<start_of_image>", "<image_soft_token>", "<end_of_image>"
LETTERS = "\u0120\u010aabcdefghijklmnopqrstuvwxyz?."  # a space and a new line as bytes are spelt
PATCH, SIDE = 8, 64
LEAST, MOST = 1024, 4096  # pixels of a Qwen's picture


def marks_of(family: str) -> tuple[str, str, str]:
    return GEMMA if family == "gemma3" else QWEN


def make_checkpoint(family: str, folder: Path) -> None:
    """A checkpoint with processor and tokenizer."""
    torch.manual_seed(0)
    model, _ = _qwen2_5_vl() if family == "qwen2_5_vl" else MAKERS[family]()
    tokenizer, template = _tokenizer(*marks_of(family)), "{{ messages[0]['content'] }}"
    if family == "gemma3":
        config = model.config
        config.vision_config.image_size, config.vision_config.patch_size = SIDE, SIDE // 16
        config.mm_tokens_per_image, config.text_config.max_position_embeddings = 256, 1024
        model = STOCK.Gemma3ForConditionalGeneration(config)
        pixels = Gemma3ImageProcessorPil(size={"height": SIDE, "width": SIDE})
        processor = STOCK.Gemma3Processor(
            image_processor=pixels, tokenizer=tokenizer, image_seq_length=256,
            chat_template=template,
        )  # fmt: skip
    else:
        pixels = Qwen2VLImageProcessorPil(
            patch_size=PATCH, merge_size=2, temporal_patch_size=2,
            size={"shortest_edge": LEAST, "longest_edge": MOST},
        )  # fmt: skip
        processor = STOCK.PaddleOCRVLProcessor(
            image_processor=pixels, tokenizer=tokenizer, chat_template=template
        )
    save_random(model, processor, folder)


def _qwen2_5_vl() -> tuple[Any, Any]:
    like, _ = MAKERS["qwen2_vl"]()
    config = STOCK.Qwen2_5_VLConfig(
        text_config=like.config.text_config.to_dict(), image_token_id=like.config.image_token_id,
        vision_config=dict(
            depth=3, hidden_size=24, intermediate_size=40, num_heads=2, patch_size=PATCH,
            spatial_merge_size=2, temporal_patch_size=2, out_hidden_size=32,
            window_size=4 * PATCH, fullatt_block_indexes=[1],
        ),
        video_token_id=5, vision_start_token_id=6, vision_end_token_id=7,
    )  # fmt: skip
    return STOCK.Qwen2_5_VLForConditionalGeneration(config), None


def _tokenizer(first: str, image: str, last: str) -> Any:
    """Its ids of marks are those of the families' configurations."""
    video = "<|video_pad|>"
    marks = [
        "<pad>",
        "<unk>",
        "<s>",
        "</s>",
        image,
        *((first, last) if first in GEMMA else (video, first, last)),
    ]
    vocabulary = {token: number for number, token in enumerate((*marks, *LETTERS))}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return STOCK.PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", pad_token="<pad>", eos_token="</s>",
        padding_side="left", additional_special_tokens=marks[4:],
        extra_special_tokens={"image_token": image, "boi_token": first, "eoi_token": last},
    )  # fmt: skip
