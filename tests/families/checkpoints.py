"""One tiny checkpoint of random numbers for each family beside those with a trained one.

All stock transformers: configuration classes, a word-level tokenizer, a processor that saves and
loads without torchvision. A family whose own processor wants a video part borrows one that is for
images alone and replaces the placeholder by the same rule.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import (
    LlavaNextImageProcessorPil,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

STOCK: Any = transformers
"""transformers without its types: few of its constructors carry any."""
SIDE, PATCH = 32, 8  # px
LAYOUTS = [[32, 64], [64, 32], [64, 64]]
_WORDS = ("how", "to", "paint", "a", "wall", "open", "user", "assistant", ":")
_GRID = tuple(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7))
_MARKS = ("<pad>", "<unk>", "<s>", "</s>", "<image>", "<fake_token_around_image>", "<global-img>")
_NAMED = {
    "image_token": "<image>",
    "fake_image_token": "<fake_token_around_image>",
    "global_image_token": "<global-img>",
}
_VOCABULARY = {word: n for n, word in enumerate([*_MARKS, "<end_of_utterance>", *_GRID, *_WORDS])}
_TEMPLATE = (
    "{% for message in messages %}user : {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endfor %} assistant :"
)
_HALF = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
_TEXT = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 5, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": len(_VOCABULARY), "max_position_embeddings": 256,
    "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "tie_word_embeddings": False,
}  # fmt: skip
_TOWER = {"hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 2,
          "num_hidden_layers": 3, "image_size": SIDE, "patch_size": PATCH}  # fmt: skip
_IMAGE = _VOCABULARY["<image>"]


def _llava_next() -> tuple[Any, Any]:
    config = STOCK.LlavaNextConfig(
        text_config=STOCK.LlamaConfig(**_TEXT), vision_config=STOCK.CLIPVisionConfig(**_TOWER),
        image_token_id=_IMAGE, image_grid_pinpoints=LAYOUTS, tie_word_embeddings=False,
        vision_feature_layer=-2, vision_feature_select_strategy="default",
    )  # fmt: skip
    return STOCK.LlavaNextForConditionalGeneration(config), _laying("default")


def _llava_onevision() -> tuple[Any, Any]:
    vision = STOCK.SiglipVisionConfig(**_TOWER, vision_use_head=False)
    config = STOCK.LlavaOnevisionConfig(
        text_config=STOCK.Qwen2Config(**_TEXT), vision_config=vision, image_token_id=_IMAGE,
        image_grid_pinpoints=LAYOUTS, vision_feature_layer=-1, tie_word_embeddings=False,
        vision_feature_select_strategy="full", vision_aspect_ratio="anyres_max_9",
    )  # fmt: skip
    return STOCK.LlavaOnevisionForConditionalGeneration(config), _laying("full")


def _instructblip() -> tuple[Any, Any]:
    config = STOCK.InstructBlipConfig(
        text_config=STOCK.LlamaConfig(**_TEXT), image_token_index=_IMAGE, num_query_tokens=4,
        vision_config=STOCK.InstructBlipVisionConfig(**_TOWER),
        qformer_config=STOCK.InstructBlipQFormerConfig(
            vocab_size=len(_VOCABULARY), hidden_size=16, num_hidden_layers=6,
            num_attention_heads=2, intermediate_size=24, max_position_embeddings=32,
        ),
    )  # fmt: skip
    return STOCK.InstructBlipForConditionalGeneration(config), _reading()


def _internvl() -> tuple[Any, Any]:
    tower = _TOWER | {"image_size": [SIDE, SIDE], "patch_size": [PATCH, PATCH]}
    config = STOCK.InternVLConfig(
        text_config=STOCK.Qwen2Config(**_TEXT),
        vision_config=STOCK.InternVLVisionConfig(**tower, use_qk_norm=True),
        image_token_id=_IMAGE, image_seq_length=4, tie_word_embeddings=False,
    )  # fmt: skip
    return STOCK.InternVLForConditionalGeneration(config), _cutting()


def _gemma3() -> tuple[Any, Any]:
    kinds = ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"]
    config = STOCK.Gemma3Config(
        text_config=STOCK.Gemma3TextConfig(
            **_TEXT | {"num_hidden_layers": 5}, head_dim=8, sliding_window=7,
            query_pre_attn_scalar=8, layer_types=[*kinds, "sliding_attention"],
        ),
        vision_config=STOCK.SiglipVisionConfig(**_TOWER, vision_use_head=False),
        image_token_id=_IMAGE, boi_token_id=5, eoi_token_id=6, mm_tokens_per_image=4,
        tie_word_embeddings=False,
    )  # fmt: skip
    return STOCK.Gemma3ForConditionalGeneration(config), _one_size()


def _idefics3() -> tuple[Any, Any]:
    config = STOCK.Idefics3Config(
        text_config=STOCK.LlamaConfig(**_TEXT), vision_config=_TOWER, scale_factor=2,
        image_token_id=_IMAGE, pad_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    return STOCK.Idefics3ForConditionalGeneration(config), _cutting()


def _smolvlm() -> tuple[Any, Any]:
    config = STOCK.SmolVLMConfig(
        text_config=STOCK.LlamaConfig(**_TEXT), vision_config=_TOWER, scale_factor=2,
        image_token_id=_IMAGE, pad_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    return STOCK.SmolVLMForConditionalGeneration(config), _cutting()


def _paligemma() -> tuple[Any, Any]:
    config = STOCK.PaliGemmaConfig(
        text_config=STOCK.GemmaConfig(**_TEXT | {"tie_word_embeddings": True}, head_dim=8),
        vision_config=STOCK.SiglipVisionConfig(**_TOWER, vision_use_head=False),
        image_token_index=_IMAGE, projection_dim=32,
    )  # fmt: skip
    return STOCK.PaliGemmaForConditionalGeneration(config), _before_the_words()


def _qwen2_vl() -> tuple[Any, Any]:
    rotary = {"type": "mrope", "rope_type": "default", "mrope_section": [2, 1, 1]}
    config = STOCK.Qwen2VLConfig(
        text_config=dict(**_TEXT, rope_scaling=rotary), image_token_id=_IMAGE,
        vision_config=dict(
            depth=3, embed_dim=24, hidden_size=32, num_heads=2, mlp_ratio=2, patch_size=PATCH,
            spatial_merge_size=2, temporal_patch_size=2, in_channels=3,
        ),
        video_token_id=5, vision_start_token_id=6, vision_end_token_id=7,
    )  # fmt: skip
    return STOCK.Qwen2VLForConditionalGeneration(config), _patching()


def _qwen3_vl() -> tuple[Any, Any]:
    rotary = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0}
    config = STOCK.Qwen3VLConfig(
        text_config=dict(**_TEXT, head_dim=8, rope_parameters=rotary), image_token_id=_IMAGE,
        vision_config=dict(
            depth=4, hidden_size=24, intermediate_size=40, num_heads=2, patch_size=PATCH,
            spatial_merge_size=2, temporal_patch_size=2, out_hidden_size=32,
            num_position_embeddings=25, deepstack_visual_indexes=[1, 2],
        ),
        video_token_id=5, vision_start_token_id=6, vision_end_token_id=7, tie_word_embeddings=False,
    )  # fmt: skip
    return STOCK.Qwen3VLForConditionalGeneration(config), _patching()


MAKERS: Mapping[str, Callable[[], tuple[Any, Any]]] = {
    "gemma3": _gemma3,
    "idefics3": _idefics3,
    "instructblip": _instructblip,
    "internvl": _internvl,
    "llava_next": _llava_next,
    "llava_onevision": _llava_onevision,
    "paligemma": _paligemma,
    "qwen2_vl": _qwen2_vl,
    "qwen3_vl": _qwen3_vl,
    "smolvlm": _smolvlm,
}


def make_checkpoint(family: str, folder: Path) -> None:
    """A checkpoint with processor and tokenizer; every tensor random, so that none can be lost."""
    torch.manual_seed(0)
    save_random(*MAKERS[family](), folder)


def save_random(model: Any, processor: Any, folder: Path) -> None:
    """Save both, every tensor of the model random."""
    source = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for name, tensor in sorted(model.named_parameters()):
            noise = 0.2 * torch.randn(tensor.shape, generator=source)
            norm = tensor.ndim == 1 and name.endswith("weight")
            tensor.copy_(tensor + noise if norm else noise)  # about 1, or 0 where 1 is added to it
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = 3, 0
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def _tokenizer(marks: Mapping[str, str] = MappingProxyType(_NAMED)) -> Any:
    core = Tokenizer(models.WordLevel(dict(_VOCABULARY), unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return STOCK.PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", pad_token="<pad>", eos_token="</s>",
        bos_token="<s>", padding_side="left", extra_special_tokens=dict(marks),
        additional_special_tokens=[*_MARKS, "<end_of_utterance>", *_GRID],
    )  # fmt: skip


def _cutting() -> Any:
    """Tiles of one size and a view of the whole, four tokens each."""
    pixels = Idefics3ImageProcessorPil(
        size={"longest_edge": 2 * SIDE}, max_image_size={"longest_edge": SIDE}, **_HALF
    )
    return STOCK.Idefics3Processor(
        image_processor=pixels, tokenizer=_tokenizer(), image_seq_len=4, chat_template=_TEMPLATE
    )


def _one_size() -> Any:
    """Every image resized to one size, four tokens between two marks."""
    pixels = Gemma3ImageProcessorPil(size={"height": SIDE, "width": SIDE}, **_HALF)
    marks = {"boi_token": "<fake_token_around_image>", "eoi_token": "<global-img>"}
    return STOCK.Gemma3Processor(
        image_processor=pixels, tokenizer=_tokenizer(_NAMED | marks), image_seq_length=4,
        chat_template=_TEMPLATE.replace("<image>", marks["boi_token"]),
    )  # fmt: skip


def _before_the_words() -> Any:
    """Every image resized to one size, 16 tokens in front; no chat template."""
    pixels = SiglipImageProcessorPil(size={"height": SIDE, "width": SIDE}, **_HALF)
    pixels.image_seq_length = (SIDE // PATCH) ** 2
    return STOCK.PaliGemmaProcessor(image_processor=pixels, tokenizer=_tokenizer())


def _reading() -> Any:
    """Every image resized to one size, four tokens in front; a Q-Former is told the words too."""
    pixels = BlipImageProcessorPil(size={"height": SIDE, "width": SIDE}, **_HALF)
    return STOCK.InstructBlipProcessor(
        image_processor=pixels, tokenizer=_tokenizer({}), qformer_tokenizer=_tokenizer({}),
        num_query_tokens=4,
    )  # fmt: skip


def _laying(strategy: str) -> Any:
    """Tiles laid out as the image, padding cut away, a newline after each row."""
    pixels = LlavaNextImageProcessorPil(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE},
        image_grid_pinpoints=LAYOUTS, **_HALF,
    )  # fmt: skip
    return STOCK.LlavaNextProcessor(
        image_processor=pixels, tokenizer=_tokenizer(), patch_size=PATCH, chat_template=_TEMPLATE,
        vision_feature_select_strategy=strategy, num_additional_image_tokens=strategy == "default",
    )  # fmt: skip


def _patching() -> Any:
    """Packed patches of an image's own grid, four a token."""
    pixels = Qwen2VLImageProcessorPil(
        patch_size=PATCH, merge_size=2, temporal_patch_size=2, **_HALF,
        size={"shortest_edge": SIDE * SIDE, "longest_edge": 4 * SIDE * SIDE},
    )  # fmt: skip
    return STOCK.PaddleOCRVLProcessor(
        image_processor=pixels, tokenizer=_tokenizer(), chat_template=_TEMPLATE
    )
