"""The decoder as it is traced: flat inputs and outputs, a finished mask, grouped attention.

The layers are transformers' own; the cache and the mask are ours, so that one graph holds for
prefill and decode and no row of attention is without a key.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.export import Dim
from transformers import DynamicCache

from guardbake.vlm.catalog import Family

from guardbake_onnx.describe import head_dim


class Decoder(torch.nn.Module):
    """Text model and LM head of a family."""

    def __init__(self, language_model: torch.nn.Module, lm_head: torch.nn.Module) -> None:
        super().__init__()
        self.language_model = language_model
        self.lm_head = lm_head

    def forward(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        past_key_values: list[tuple[torch.Tensor, torch.Tensor]],
        mutual_mask: torch.Tensor | None = None,
        **more: Any,
    ) -> Any:
        past, seq = past_key_values[0][0].shape[2], inputs_embeds.shape[1]
        query = torch.arange(seq)[:, None] + past
        key = torch.arange(past + seq)[None]
        seen = key <= query
        if mutual_mask is not None:
            seen = seen | _side_by_side(mutual_mask, past)
        real = attention_mask.to(torch.bool)[:, None, None, :]
        # padding attends to itself: softmax over no key at all is not a number in some runtimes
        mask = (seen & real) | (key == query)
        cache: Any = DynamicCache([(k, v) for k, v in past_key_values])
        hidden = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=self._taken(mask, query - key),
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
            **more,
        ).last_hidden_state
        return self.lm_head(hidden), [(layer.keys, layer.values) for layer in cache.layers]

    def _taken(self, mask: torch.Tensor, distance: torch.Tensor) -> Any:
        """The mask as the text model takes it: as it is, or by kind of layer."""
        model: Any = self.language_model
        kinds = MASKS[type(model).__name__]
        by_kind = {"full_attention": mask}
        if "sliding_attention" in kinds:
            by_kind["sliding_attention"] = mask & (distance < model.config.sliding_window)
        return by_kind if kinds else mask


class DeepstackDecoder(Decoder):
    """The same, with features for the first layers: deepstack_embeds [levels, batch, seq, d]."""

    def forward(  # type: ignore[override]
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        deepstack_embeds: torch.Tensor,
        past_key_values: list[tuple[torch.Tensor, torch.Tensor]],
    ) -> Any:
        return super().forward(
            inputs_embeds,
            attention_mask,
            position_ids,
            past_key_values,
            deepstack_visual_embeds=deepstack_embeds.unbind(0),
        )


class MutualDecoder(Decoder):
    """The same, told which new tokens see each other where they stand side by side, mutual_mask
    [batch, seq] bool: those of an image, or of a prompt."""

    def forward(  # type: ignore[override]
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        mutual_mask: torch.Tensor,
        past_key_values: list[tuple[torch.Tensor, torch.Tensor]],
    ) -> Any:
        return super().forward(
            inputs_embeds, attention_mask, position_ids, past_key_values, mutual_mask
        )


MASKS: dict[str, tuple[str, ...]] = {
    "Gemma3TextModel": ("full_attention", "sliding_attention"),
    "GemmaModel": (),
    "LlamaModel": (),
    "MistralModel": (),
    "Qwen2Model": ("full_attention",),
    "Qwen2VLTextModel": ("full_attention",),
    "Qwen2_5_VLTextModel": ("full_attention",),
    "Qwen3Model": ("full_attention",),
    "Qwen3VLTextModel": (),
}
"""The text models we know, and by which kinds of layers they take finished masks; none for those
that take one mask for all their layers."""


def _side_by_side(mutual_mask: torch.Tensor, past: int) -> torch.Tensor:
    """[batch, 1, seq, past + seq]: both tokens are new and of one run of such tokens."""
    before = torch.nn.functional.pad(mutual_mask[:, :-1], (1, 0), value=False)
    run = (mutual_mask & ~before).to(torch.int64).cumsum(1)
    run = torch.where(mutual_mask, run, 0)
    keys = torch.cat([run.new_zeros(run.shape[0], past), run], dim=1)
    return ((run[:, :, None] == keys[:, None]) & mutual_mask[:, :, None])[:, None]


def grouped_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    scaling: float | None = None,
    dropout: float = 0.0,
    **unused: object,
) -> tuple[torch.Tensor, None]:
    """transformers' attention signature; keys and values stay ungrouped (no repeat_kv)."""
    attended = torch.nn.functional.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=attention_mask,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return attended.transpose(1, 2).contiguous(), None


@contextlib.contextmanager
def angles_in_order(decoder: Any) -> Iterator[None]:
    """Let a text model with several kinds of angles compute them in one order: it goes through a
    set of their names, whose order is another in every process."""
    rotary = decoder.rotary_emb
    kinds = getattr(rotary, "layer_types", ())
    known: dict[str, Any] = {}

    def angles(x: torch.Tensor, position_ids: torch.Tensor, kind: str) -> Any:
        for each in [] if known else kinds:
            known[each] = type(rotary).forward(rotary, x, position_ids, each)
        return known[kind]

    if kinds:
        rotary.forward = angles
    try:
        yield
    finally:
        if kinds:
            del rotary.forward  # the class's own is seen again


def example(
    config: Any, layers: int, dtype: torch.dtype, family: Family, levels: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Example inputs and their dynamic shapes; unequal sizes, or one is taken for another."""
    rows, new, cached = 2, 5, 3
    batch, seq, past = Dim("batch"), Dim("seq"), Dim("past")
    cache = (rows, config.num_key_value_heads, cached, head_dim(config))
    position_shape = (3, rows, new) if family.position == "mrope" else (rows, new)
    position_dims = {1: batch, 2: seq} if family.position == "mrope" else {0: batch, 1: seq}
    inputs: dict[str, Any] = {
        "inputs_embeds": torch.zeros(rows, new, config.hidden_size, dtype=dtype),
        "attention_mask": torch.ones(rows, cached + new, dtype=torch.int64),
        "position_ids": torch.zeros(position_shape, dtype=torch.int64),
    }
    dynamic: dict[str, Any] = {
        "inputs_embeds": {0: batch, 1: seq},
        "attention_mask": {0: batch, 1: Dim.DYNAMIC},
        "position_ids": position_dims,
    }
    if levels:
        inputs["deepstack_embeds"] = torch.zeros(levels, rows, new, config.hidden_size, dtype=dtype)
        dynamic["deepstack_embeds"] = {1: batch, 2: seq}
    if family.mask != "causal":
        inputs["mutual_mask"] = torch.zeros(rows, new, dtype=torch.bool)
        dynamic["mutual_mask"] = {0: batch, 1: seq}
    inputs["past_key_values"] = [
        (torch.zeros(cache, dtype=dtype), torch.zeros(cache, dtype=dtype)) for _ in range(layers)
    ]
    dynamic["past_key_values"] = [({0: batch, 2: past}, {0: batch, 2: past}) for _ in range(layers)]
    return inputs, dynamic


def names(arguments: list[str], layers: int) -> tuple[list[str], list[str]]:
    """Inputs and outputs of the graph, for these arguments of forward."""
    pairs = [(n, kind) for n in range(layers) for kind in ("key", "value")]
    inputs = [name for name in arguments if name != "past_key_values"]
    inputs += [f"past_key_values.{n}.{kind}" for n, kind in pairs]
    return inputs, ["logits", *(f"present.{n}.{kind}" for n, kind in pairs)]
