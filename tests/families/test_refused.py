"""What a family's checkpoint may hold that we do not export: refused before anything is traced."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from guardbake.errors import UnsupportedError
from guardbake.vlm.catalog import family_of
from guardbake.vlm.hollow import hollow_from_config
from guardbake.vlm.tokens import collate

from guardbake_onnx.capture import capture_decoder
from tests.families.checkpoints import STOCK

SIZES = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "vocab_size": 8,
         "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}  # fmt: skip


def hollow_llava_next(text: Any) -> Any:
    vision = STOCK.CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_attention_heads=2, num_hidden_layers=1
    )
    return hollow_from_config(STOCK.LlavaNextConfig(text_config=text, vision_config=vision))


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (STOCK.MistralConfig(**SIZES, sliding_window=4), r"layers of \['sliding_attention'\]"),
        (STOCK.PhiConfig(**{k: v for k, v in SIZES.items() if k != "head_dim"}), "PhiModel"),
        (
            STOCK.Gemma3TextConfig(**SIZES, use_bidirectional_attention=True),
            "that look back",
        ),
    ],
)
def test_text_models_we_have_no_mask_for(text: Any, found: str) -> None:
    """A window that the configuration does not spell layer by layer, and one that looks ahead."""
    model = hollow_llava_next(text)
    with pytest.raises(UnsupportedError, match=found):
        capture_decoder(model, family_of(model.config))


def test_tiles_that_the_processor_pads() -> None:
    """Padding must not be looked at, and the tower's graph has no mask for it."""
    seen = np.ones((1, 2, 4, 4), np.int64)
    encoded = {
        "input_ids": np.array([[1, 2]]),
        "pixel_values": np.zeros((1, 2, 3, 4, 4), np.float32),
        "pixel_attention_mask": seen,
    }
    processor = SimpleNamespace(
        tokenizer=SimpleNamespace(pad_token_id=0), apply_chat_template=lambda *_, **__: encoded
    )
    requests = [("how to", Image.new("RGB", (4, 4)))]
    pixels = collate(processor, 2, requests).pixel_values
    assert pixels is not None
    assert pixels.shape == (2, 3, 4, 4)
    seen[0, 1, 2:] = 0
    with pytest.raises(UnsupportedError, match="25% is padding"):
        collate(processor, 2, requests)
