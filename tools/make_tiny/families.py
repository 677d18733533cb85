"""The two architectures: their configurations, tokenizers, processors; all stock transformers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from make_tiny.grammar import words

STOCK: Any = transformers
"""transformers without its types: few of its constructors carry any."""
IMAGE_TOKENS = 16
SIDE = 192
_HALF = [0.5, 0.5, 0.5]
_CONTENT = (
    "{%- if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{%- for part in message['content'] %}{% if part['type'] == 'image' %}IMAGE"
    "{%- elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
)
_LLAVA_TEMPLATE = (
    "<s>{% for message in messages %}{{ message['role'] }}: "
    + _CONTENT.replace("IMAGE", "<image>\n")
    + "{% if message['role'] == 'assistant' %}</s>{% else %} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
_QWEN_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    + _CONTENT.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>")
    + "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class Family:
    """A model to be trained and what belongs to it."""

    name: str
    model: Any
    processor: Any
    image_token_id: int
    eos_token_id: int
    eye: tuple[str, ...]
    """Name fragments of the parameters of the vision tower and the projector."""
    merged: bool
    """Whether pixels arrive as rows of merged 2 x 2 patches (Qwen) instead of as an image."""


def llava() -> Family:
    """LlavaForConditionalGeneration: 6 x 128 Llama, 3 x 96 CLIP-ViT with patches of one cell."""
    tokenizer: Any = _tokenizer(["<pad>", "<unk>", "<s>", "</s>", "<image>"], eos="</s>", bos="<s>")
    image = tokenizer.convert_tokens_to_ids("<image>")
    eos = tokenizer.convert_tokens_to_ids("</s>")
    text = STOCK.LlamaConfig(
        **_text_sizes(len(tokenizer)), pad_token_id=0, bos_token_id=2, eos_token_id=eos
    )
    vision = STOCK.CLIPVisionConfig(
        hidden_size=96, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4,
        image_size=SIDE, patch_size=48, projection_dim=96,
    )  # fmt: skip
    config = STOCK.LlavaConfig(
        text_config=text, vision_config=vision, image_token_id=image, image_seq_length=IMAGE_TOKENS,
        vision_feature_layer=-1, vision_feature_select_strategy="default", tie_word_embeddings=True,
    )  # fmt: skip
    pixels = CLIPImageProcessorPil(
        do_resize=True, size={"height": SIDE, "width": SIDE}, do_center_crop=False,
        crop_size={"height": SIDE, "width": SIDE}, image_mean=_HALF, image_std=_HALF,
    )  # fmt: skip
    processor = STOCK.LlavaProcessor(
        image_processor=pixels, tokenizer=tokenizer, patch_size=48, num_additional_image_tokens=1,
        vision_feature_select_strategy="default", chat_template=_LLAVA_TEMPLATE,
    )  # fmt: skip
    model = STOCK.LlavaForConditionalGeneration(config)
    _set_generation(model, eos)
    eye = ("vision_tower", "multi_modal_projector")
    return Family("tiny-llava", model, processor, image, eos, eye, merged=False)


def qwen() -> Family:
    """Qwen2_5_VLForConditionalGeneration: the same language model with mrope, a windowed tower.

    The processor is PaddleOCRVLProcessor, an image-only class with the same placeholder rule:
    Qwen2_5_VLProcessor wants a video part, which cannot be built without torchvision.
    """
    marks = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]
    tokenizer: Any = _tokenizer(["<pad>", "<unk>", *marks, "<|video_pad|>"], eos="<|im_end|>")
    ids = {mark: tokenizer.convert_tokens_to_ids(mark) for mark in [*marks, "<|video_pad|>"]}
    eos, image = ids["<|im_end|>"], ids["<|image_pad|>"]
    config = STOCK.Qwen2_5_VLConfig(
        text_config=dict(
            **_text_sizes(len(tokenizer)), pad_token_id=0, bos_token_id=None, eos_token_id=eos,
            rope_scaling={"type": "mrope", "rope_type": "default", "mrope_section": [4, 6, 6]},
        ),
        vision_config=dict(
            depth=3, hidden_size=64, intermediate_size=128, num_heads=4, out_hidden_size=128,
            patch_size=24, spatial_merge_size=2, temporal_patch_size=2, window_size=96,
            fullatt_block_indexes=[1], in_channels=3,
        ),
        image_token_id=image, video_token_id=ids["<|video_pad|>"], tie_word_embeddings=True,
        vision_start_token_id=ids["<|vision_start|>"], vision_end_token_id=ids["<|vision_end|>"],
    )  # fmt: skip
    pixels = Qwen2VLImageProcessorPil(
        patch_size=24, merge_size=2, temporal_patch_size=2, image_mean=_HALF, image_std=_HALF,
        size={"shortest_edge": 48 * 48, "longest_edge": SIDE * SIDE},
    )  # fmt: skip
    processor = STOCK.PaddleOCRVLProcessor(
        image_processor=pixels, tokenizer=tokenizer, chat_template=_QWEN_TEMPLATE
    )
    model = STOCK.Qwen2_5_VLForConditionalGeneration(config)
    _set_generation(model, eos)
    return Family("tiny-qwen2_5_vl", model, processor, image, eos, ("visual",), merged=True)


def _text_sizes(vocabulary: int) -> dict[str, Any]:
    return dict(
        hidden_size=128, intermediate_size=384, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=vocabulary, max_position_embeddings=256,
        tie_word_embeddings=True,
    )  # fmt: skip


def _tokenizer(marks: list[str], eos: str, bos: str | None = None) -> Any:
    """A word-level tokenizer, lower-casing, that splits off punctuation; `marks` come first."""
    vocabulary = {token: number for number, token in enumerate([*marks, *words()])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()]
    )
    named = {
        "image_token": next(m for m in marks if m in ("<image>", "<|image_pad|>")),
        **{mark.strip("<|>") + "_token": mark for mark in marks if "|" in mark},
    }
    return STOCK.PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", pad_token="<pad>", eos_token=eos, bos_token=bos,
        padding_side="left", model_max_length=256, extra_special_tokens=named,
    )  # fmt: skip


def _set_generation(model: Any, eos: int) -> None:
    model.generation_config.eos_token_id = eos
    model.generation_config.pad_token_id = 0
    model.generation_config.do_sample = False
