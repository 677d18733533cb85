"""A tiny judge on disk: a random Llama of two layers and a tokenizer of whole words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = ("safe", "unsafe", "name", "a", "tree", "bird", "user:", "agent:", "verdict:")
NUMBERS = ("one", "two", "three", "four", "five", "six", "seven")
TEMPLATE = (
    "<s>{% for m in messages %} {{ 'user:' if m['role'] == 'user' else 'agent:' }} "
    "{{ m['content'] }} {% endfor %}verdict:"
)


@pytest.fixture(scope="session")
def judge_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("judge")
    vocabulary = {
        word: i for i, word in enumerate(["<pad>", "<unk>", "<s>", "</s>", *WORDS, *NUMBERS])
    }
    words = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = WhitespaceSplit()
    tokenizers: Any = PreTrainedTokenizerFast
    tokenizer = tokenizers(
        tokenizer_object=words, pad_token="<pad>", unk_token="<unk>", bos_token="<s>"
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.4,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder
