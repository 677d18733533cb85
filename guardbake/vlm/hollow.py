"""A VLM without its weights: the modules its configuration describes, parameters of shape alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from transformers import AutoModelForImageTextToText, GenerationConfig, PreTrainedModel
from transformers.utils import GENERATION_CONFIG_NAME

from guardbake.vlm.load import read_config


def hollow_model(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The model that folder/config.json describes; a checkpoint's weights need not be there.

    Parameters are on the device "meta" and take no memory. Buffers that are no part of a checkpoint
    (rotary frequencies, position ids) are real, as `load_vlm` computes them. In eval mode,
    attention "sdpa". Raises UsageError (no configuration), UnsupportedError (another family).
    """
    model = hollow_from_config(read_config(folder), dtype)
    if (folder / GENERATION_CONFIG_NAME).is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    return model


def hollow_from_config(config: Any, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The same from a transformers configuration."""
    maker: Any = AutoModelForImageTextToText
    with init_empty_weights(include_buffers=False):
        model: PreTrainedModel = maker.from_config(config, dtype=dtype, attn_implementation="sdpa")
    model.tie_weights()  # each was made empty on its own
    model.train(False)
    model.requires_grad_(False)
    return model
