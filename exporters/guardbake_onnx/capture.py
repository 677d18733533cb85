"""Capture the decoder of a VLM, LM head included, as one graph for prefill and decode."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
from transformers import PreTrainedModel

from guardbake.errors import UnsupportedError
from guardbake.site import Site
from guardbake.vlm.catalog import Family

from guardbake_onnx import tidy
from guardbake_onnx.decoder import (
    MASKS,
    Decoder,
    DeepstackDecoder,
    MutualDecoder,
    angles_in_order,
    example,
    grouped_attention,
    names,
)
from guardbake_onnx.deepstack import added_everywhere, deepstack_levels
from guardbake_onnx.parameters import order_parameters
from guardbake_onnx.replicate import only_layers, replicate, template_layers
from guardbake_onnx.trace import attention_as, trace

_ROOTS = {"language_model": "model"}
_FULL, _NORM = "full_attention", "RMSNormalization"


def capture_decoder(model: PreTrainedModel, family: Family, whole: bool = False) -> ir.Model:
    """The decoder's graph; its parameters are inputs (see `parameters`) and may have no data.

    inputs_embeds [batch, seq, d], attention_mask [batch, past + seq] int64, position_ids
    [batch, seq] or [3, batch, seq] int64, for a family with deepstack deepstack_embeds [levels,
    batch, seq, d], for one whose mask is not "causal" mutual_mask [batch, seq] bool,
    past_key_values.N.key/value [batch, kv, past, head_dim] -> logits [batch, seq, V],
    present.N.key/value. The last product of layer N's FFN has the name
    Site(N, "ffn_output").onnx_value. whole: trace every layer instead of copying the second of each
    kind; the same graph in more time. Raises UnsupportedError for text models and kinds of layers
    that we do not know, SiteError where an FFN has not exactly one output.
    """
    decoder: Any = model.get_submodule(family.decoder)
    config, levels = decoder.config, deepstack_levels(model, family)
    kinds = _kinds(decoder, family, levels)
    traced = range(len(kinds)) if whole else template_layers(kinds)
    kind = Decoder if family.mask == "causal" else MutualDecoder
    wrapper = (DeepstackDecoder if levels else kind)(decoder, model.get_submodule(family.head))
    inputs, dynamic = example(config, len(traced), model.dtype, family, levels)
    name = family.layers.removeprefix(f"{family.decoder}.")
    with (
        attention_as(config, "guardbake_grouped", grouped_attention),
        only_layers(decoder, name, traced),
        added_everywhere(decoder, levels),
        angles_in_order(decoder),
    ):
        graph = trace(wrapper, inputs, dynamic, *names(list(inputs), len(traced)))
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
    values = {_last_product(value): Site(n, "ffn_output").onnx_value for value, n in sites.items()}
    tidy.name_by_module(model, _ROOTS, values)
    tidy.strip_metadata(model)
    order_parameters(graph, {"language_model": family.decoder, "lm_head": family.head})
    return model


def _last_product(output: ir.Value) -> ir.Value:
    """The FFN's own output, where a norm follows it, in half precision one with casts around it."""
    normed = _uncast(output).producer()
    before = normed.inputs[0] if normed is not None and normed.op_type == _NORM else None
    return output if before is None else _uncast(before)


def _uncast(value: ir.Value) -> ir.Value:
    node = value.producer()
    before = node.inputs[0] if node is not None and node.op_type == "Cast" else None
    return value if before is None else before


def _kinds(decoder: Any, family: Family, levels: int) -> list[str]:
    """The kind of each layer: what it attends to, or the level of features that joins after it.

    Raises UnsupportedError for a text model, or a kind, that we have no mask for.
    """
    name, config = type(decoder).__name__, decoder.config
    if name not in MASKS:
        raise UnsupportedError(
            found=f"a text model {name}",
            expected=f"one of {sorted(MASKS)}",
            where="the checkpoint",
            remedy="export with another tool and use guardbake apply",
        )
    depth = config.num_hidden_layers
    kinds = list(getattr(config, "layer_types", None) or [_FULL] * depth)
    if name == "MistralModel" and config.sliding_window is not None:
        kinds = ["sliding_attention"] * depth  # its configuration has no kinds of layers
    known = {_FULL, *MASKS[name]}
    # which a prefix mask is given with; without one it means that every token sees every other
    ahead = getattr(config, "use_bidirectional_attention", False) and family.mask != "prefix"
    if not set(kinds) <= known or ahead:
        raise UnsupportedError(
            found=f"layers of {sorted(set(kinds))}",
            expected=f"layers of {sorted(known)} that look back",
            where="the text configuration",
            remedy="turn the sliding window off, or export with another tool",
        )
    return [*(f"level {n}" for n in range(levels)), *kinds[levels:]]
