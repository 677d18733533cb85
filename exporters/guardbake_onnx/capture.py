"""Capture the decoder of a VLM, LM head included, as one graph for prefill and decode.

The layers are transformers' own; the cache, the mask and grouped attention are ours, so that the
graph has flat inputs and outputs, few operators, and no row of attention without a key.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import torch
from torch.export import Dim
from transformers import DynamicCache, PreTrainedModel

from guardbake.errors import UnsupportedError
from guardbake.site import Site
from guardbake.vlm.catalog import Family

from guardbake_onnx import tidy
from guardbake_onnx.deepstack import added_everywhere, deepstack_levels
from guardbake_onnx.describe import head_dim
from guardbake_onnx.parameters import order_parameters
from guardbake_onnx.replicate import only_layers, replicate, template_layers
from guardbake_onnx.trace import attention_as, trace

_ROOTS = {"language_model": "model"}


def capture_decoder(model: PreTrainedModel, family: Family, whole: bool = False) -> ir.Model:
    """The decoder's graph; its parameters are inputs (see `parameters`) and may have no data.

    inputs_embeds [batch, seq, d], attention_mask [batch, past + seq] int64, position_ids
    [batch, seq] or [3, batch, seq] int64, for a family with deepstack deepstack_embeds [levels,
    batch, seq, d], past_key_values.N.key/value [batch, kv, past, head_dim] -> logits
    [batch, seq, V], present.N.key/value. The FFN output of layer N is named
    Site(N, "ffn_output").onnx_value. whole: trace every layer instead of copying the second one;
    the same graph in more time. Raises UnsupportedError for layers that are not full attention,
    SiteError where an FFN has not exactly one output.
    """
    decoder: Any = model.get_submodule(family.decoder)
    config = decoder.config
    _check_decoder(decoder)
    levels = deepstack_levels(model, family)
    kinds = [f"deepstack {level}" for level in range(levels)]
    kinds += ["full_attention"] * (config.num_hidden_layers - levels)
    traced = range(len(kinds)) if whole else template_layers(kinds)
    wrapper = (_DeepstackDecoder if levels else _Decoder)(decoder, model.get_submodule(family.head))
    inputs, dynamic = _example(config, len(traced), model.dtype, family, levels)
    name = family.layers.removeprefix(f"{family.decoder}.")
    with (
        attention_as(config, "guardbake_grouped", _grouped_attention),
        only_layers(decoder, name, traced),
        added_everywhere(decoder, levels),
    ):
        graph = trace(wrapper, inputs, dynamic, *_names(list(inputs), len(traced)))
    return _finish(graph, kinds, family, whole)


def _finish(model: ir.Model, kinds: list[str], family: Family, whole: bool) -> ir.Model:
    """Tidy a traced decoder, give it all its layers and name its sites."""
    graph = model.graph
    tidy.transpose_weights(model)
    tidy.simplify(model)
    layers = family.layers.replace(family.decoder, "language_model", 1)
    if not whole:
        replicate(graph, layers, kinds)
    # the exporter cannot say that the mask covers past and present, and invents a symbol
    mask = next(value for value in graph.inputs if value.name == "attention_mask")
    if mask.shape is not None:
        tidy.rename_dimension(graph, str(mask.shape[1]), "past + seq")
    sites = {
        tidy.single_leaving_value(graph, f"{layers}.{n}.{family.feed_forward}"): n
        for n in range(len(kinds))
    }
    names = {value: Site(n, "ffn_output").onnx_value for value, n in sites.items()}
    tidy.name_by_module(model, _ROOTS, names)
    tidy.strip_metadata(model)
    order_parameters(graph, {"language_model": family.decoder, "lm_head": family.head})
    return model


def _check_decoder(decoder: Any) -> None:
    kind = type(decoder).__name__
    if kind not in _MASKS:
        raise UnsupportedError(
            found=f"a text model {kind}",
            expected=f"one of {sorted(_MASKS)}",
            where="the checkpoint",
            remedy="export with another tool and use guardbake apply",
        )
    layers = set(getattr(decoder.config, "layer_types", None) or ["full_attention"])
    if kind == "MistralModel" and decoder.config.sliding_window is not None:
        layers = {"sliding_attention"}  # its configuration has no kinds of layers
    if layers != {"full_attention"}:
        raise UnsupportedError(
            found=f"layers of {sorted(layers)}",
            expected="full attention in every layer",
            where="the text configuration",
            remedy="turn the sliding window off, or export with another tool",
        )


class _Decoder(torch.nn.Module):
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
        **more: Any,
    ) -> Any:
        past, seq = past_key_values[0][0].shape[2], inputs_embeds.shape[1]
        query = torch.arange(seq)[:, None] + past
        key = torch.arange(past + seq)[None]
        real = attention_mask.to(torch.bool)[:, None, None, :]
        # padding attends to itself: softmax over no key at all is not a number in some runtimes
        mask = ((key <= query) & real) | (key == query)
        cache: Any = DynamicCache([(k, v) for k, v in past_key_values])
        hidden = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=_MASKS[type(self.language_model).__name__](mask),
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
            **more,
        ).last_hidden_state
        return self.lm_head(hidden), [(layer.keys, layer.values) for layer in cache.layers]


class _DeepstackDecoder(_Decoder):
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


def _as_it_is(mask: torch.Tensor) -> Any:
    return mask


def _by_kind(mask: torch.Tensor) -> Any:
    return {"full_attention": mask}


# how a text model takes a finished mask: as it is, or by kind of layer
_MASKS: dict[str, Any] = {
    "LlamaModel": _as_it_is,
    "MistralModel": _as_it_is,
    "Qwen2Model": _by_kind,
    "Qwen2VLTextModel": _by_kind,
    "Qwen2_5_VLTextModel": _by_kind,
    "Qwen3Model": _by_kind,
    "Qwen3VLTextModel": _as_it_is,
}


def _grouped_attention(
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


def _names(arguments: list[str], layers: int) -> tuple[list[str], list[str]]:
    pairs = [(n, kind) for n in range(layers) for kind in ("key", "value")]
    inputs = [name for name in arguments if name != "past_key_values"]
    inputs += [f"past_key_values.{n}.{kind}" for n, kind in pairs]
    return inputs, ["logits", *(f"present.{n}.{kind}" for n, kind in pairs)]


def _example(
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
    inputs["past_key_values"] = [
        (torch.zeros(cache, dtype=dtype), torch.zeros(cache, dtype=dtype)) for _ in range(layers)
    ]
    dynamic["past_key_values"] = [({0: batch, 2: past}, {0: batch, 2: past}) for _ in range(layers)]
    return inputs, dynamic
