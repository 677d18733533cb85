"""The tiny decoder as torch.onnx.export traces it: embeddings in, a cache in and out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.export import Dim
from transformers import DynamicCache, LlamaForCausalLM

Pairs = list[tuple[torch.Tensor, torch.Tensor]]


class Decoder(torch.nn.Module):
    def __init__(self, llama: LlamaForCausalLM) -> None:
        super().__init__()
        self.model, self.lm_head = llama.model, llama.lm_head

    def forward(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        past_key_values: Pairs,
    ) -> tuple[torch.Tensor, Pairs]:
        out = self.model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=DynamicCache(list(past_key_values)),
            use_cache=True,
        )
        layers = out.past_key_values.layers
        return self.lm_head(out.last_hidden_state), [(each.keys, each.values) for each in layers]


def trace(source: Path, target: Path) -> None:
    llama = LlamaForCausalLM.from_pretrained(source).eval()
    config = llama.config
    heads, size, layers = config.num_key_value_heads, config.head_dim, config.num_hidden_layers
    feeds: dict[str, Any] = {
        "inputs_embeds": torch.randn(2, 5, config.hidden_size),
        "attention_mask": torch.ones(2, 8, dtype=torch.long),
        "position_ids": torch.arange(3, 8)[None].repeat(2, 1),
        "past_key_values": [
            (torch.randn(2, heads, 3, size), torch.randn(2, heads, 3, size)) for _ in range(layers)
        ],
    }
    feeds["attention_mask"][0, :2] = 0  # a mask of ones would be traced as no mask
    batch, tokens, past = Dim("batch"), Dim("tokens"), Dim("past")
    cached = {0: batch, 2: past}
    shapes = {
        "inputs_embeds": {0: batch, 1: tokens},
        "attention_mask": {0: batch, 1: Dim.DYNAMIC},
        "position_ids": {0: batch, 1: tokens},
        "past_key_values": [(cached, cached)] * layers,
    }
    pairs = [f"{layer}.{part}" for layer in range(layers) for part in ("key", "value")]
    torch.onnx.export(
        Decoder(llama),
        (),
        kwargs=feeds,
        dynamo=True,
        opset_version=20,
        dynamic_shapes=shapes,
        input_names=[*list(feeds)[:3], *(f"past_key_values.{pair}" for pair in pairs)],
        output_names=["logits", *(f"present.{pair}" for pair in pairs)],
    ).save(str(target))
