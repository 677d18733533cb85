"""Trace a tower whose image is read by queries: InstructBLIP's Q-Former (arXiv 2305.06500).

A fixed number of learnt queries attend to the image, to each other and to the instruction, so what
is said beside an image changes its features.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.export import Dim
from transformers import PreTrainedModel

from guardbake.vlm.catalog import Family

from guardbake_onnx.decoder import grouped_attention
from guardbake_onnx.replicate import only_layers, template_layers
from guardbake_onnx.tower import Tower, full_attention, stack_of
from guardbake_onnx.trace import attention_as, trace

QFORMER, QUERIES = "qformer", "query_tokens"


class _Queries(torch.nn.Module):
    """Tower, queries, Q-Former and projector, each under its own name in the model."""

    def __init__(self, model: PreTrainedModel, family: Family) -> None:
        super().__init__()
        self._tower, self._projector = family.vision, family.projector
        for name in (self._tower, QFORMER, self._projector):
            self.add_module(name, model.get_submodule(name))
        self.register_parameter(QUERIES, model.get_parameter(QUERIES))

    def forward(
        self,
        pixel_values: torch.Tensor,
        qformer_input_ids: torch.Tensor,
        qformer_attention_mask: torch.Tensor,
    ) -> Any:
        tower: Any = self.get_submodule(self._tower)
        qformer: Any = self.get_submodule(QFORMER)
        queries = self.get_parameter(QUERIES).expand(pixel_values.shape[0], -1, -1)
        count = queries.shape[1]
        # queries are seen by all: no row of attention is without a key
        seen = torch.nn.functional.pad(
            qformer_attention_mask.to(torch.bool), (count, 0), value=True
        )
        square = seen[:, None, None, :].expand(-1, 1, seen.shape[1], -1)  # runtimes ask for that
        read = qformer(
            input_ids=qformer_input_ids,
            attention_mask=square,
            query_embeds=queries,
            encoder_hidden_states=tower(pixel_values).last_hidden_state,
        ).last_hidden_state
        projector: Any = self.get_submodule(self._projector)
        return projector(read[:, :count]).flatten(0, 1)


def trace_queries(model: PreTrainedModel, family: Family, whole: bool) -> Tower:
    """pixel_values [images, 3, h, w], qformer_input_ids and qformer_attention_mask [images,
    longest] int64: the instruction beside each image, and which of it is real."""
    tower, qformer = (model.get_submodule(name) for name in (family.vision, QFORMER))
    config: Any = model.config
    vision, reader = config.vision_config, config.qformer_config
    towers, readers = stack_of(tower), stack_of(qformer)
    every = reader.cross_attention_frequency
    kinds = {
        f"{family.vision}.{towers}": ["layer"] * vision.num_hidden_layers,
        f"{QFORMER}.{readers}": [
            "words" if layer % every else "words and image"
            for layer in range(reader.num_hidden_layers)
        ],
    }
    seen, read = (range(len(of)) if whole else template_layers(of) for of in kinds.values())
    inputs, dynamic = _example(vision, model.dtype)
    with (
        attention_as(vision, "guardbake_full", full_attention),
        attention_as(reader, "guardbake_grouped", grouped_attention),
        only_layers(tower, towers, seen),
        only_layers(qformer, readers, read),
    ):
        graph = trace(_Queries(model, family), inputs, dynamic, list(inputs), ["image_features"])
    return Tower(graph, kinds)


def _example(vision: Any, dtype: torch.dtype) -> tuple[dict[str, Any], dict[str, Any]]:
    """Example inputs of two images, and their dynamic shapes."""
    images, longest = Dim("images"), Dim("instruction")
    words = torch.ones(2, 7, dtype=torch.int64)
    inputs = {
        "pixel_values": torch.zeros(2, 3, vision.image_size, vision.image_size, dtype=dtype),
        "qformer_input_ids": words,
        "qformer_attention_mask": words.clone(),
    }
    dynamic: dict[str, Any] = {name: {0: images, 1: longest} for name in inputs}
    dynamic["pixel_values"] = {0: images}
    return inputs, dynamic
