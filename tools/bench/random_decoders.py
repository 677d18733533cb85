"""Decoders of real shapes with random weights, guarded by a random guard: only time and size count.

Captured as the exporter captures a checkpoint's. The weights of a shape may all be read from one
block of random numbers, so that a 7B takes a tenth of its size on disk; every one of them still has
memory of its own where onnxruntime loads it. TensorRT's parser refuses such a file.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx_ir as ir
import torch
from transformers import AutoConfig, CLIPVisionConfig, LlamaConfig, LlavaConfig

from guardbake.passes.insert import InsertGuard
from guardbake.plugins import Number
from guardbake.site import Site
from guardbake.spec import Branch, Edit, GuardSpec, ModelIdentity, Reading, Sensor
from guardbake.vlm.catalog import family_of, models_root
from guardbake.vlm.hollow import hollow_from_config

from guardbake_onnx.capture import capture_decoder
from guardbake_onnx.parameters import give_values, parameters_of

FamilyName = Literal["llava", "qwen2_5_vl"]
DATA = "weights.data"
_BLOCK = 1 << 24  # numbers drawn at a time
_PAGE = 4096  # bytes


@dataclass(frozen=True)
class Shape:
    """Of a decoder; groups are its key/value heads, inner the width of its FFN."""

    width: int
    layers: int
    heads: int
    groups: int
    inner: int
    vocabulary: int


SHAPES: dict[tuple[FamilyName, str], Shape] = {
    ("llava", "tiny"): Shape(128, 4, 4, 4, 384, 512),
    ("qwen2_5_vl", "tiny"): Shape(128, 4, 4, 2, 384, 512),
    ("llava", "demo"): Shape(576, 30, 9, 3, 1536, 49152),
    ("qwen2_5_vl", "demo"): Shape(576, 30, 9, 3, 1536, 49152),
    ("llava", "400m"): Shape(1024, 24, 16, 16, 3584, 32064),
    ("qwen2_5_vl", "400m"): Shape(1024, 24, 16, 4, 3584, 32064),
    ("llava", "7b"): Shape(4096, 32, 32, 32, 11008, 32064),
    ("qwen2_5_vl", "7b"): Shape(3584, 28, 28, 4, 18944, 152064),
}


@dataclass(frozen=True)
class Decoders:
    """One decoder in two files that share their weights. nodes: of the guard, by name."""

    guarded: Path
    unguarded: Path
    spec: GuardSpec
    nodes: tuple[str, ...]
    parameters: int


def random_decoders(
    family: FamilyName, size: str, number: Number, folder: Path, *, shared: bool
) -> Decoders:
    """Write guarded.onnx, unguarded.onnx and their weights. shared: all from one block."""
    shape, config = SHAPES[family, size], config_of(family, size)
    model = hollow_from_config(config, getattr(torch, number))
    graph = capture_decoder(model, family_of(config))
    parameters = _give_weights(graph, folder / DATA, shared)
    spec = random_guard(family, shape.width, shape.layers)
    unguarded, guarded = folder / "unguarded.onnx", folder / "guarded.onnx"
    ir.save(graph, unguarded)
    nodes = InsertGuard(spec)(graph).nodes
    ir.save(graph, guarded)
    return Decoders(guarded, unguarded, spec, tuple(nodes), parameters)


def random_guard(family: str, width: int, layers: int, threshold: float = 0.0) -> GuardSpec:
    """A sequence gate read at a third of the depth; three edits behind it, of rank 16 and 8."""
    rng = np.random.default_rng(0)

    def vector() -> Any:
        return rng.standard_normal(width).astype(np.float32)

    def basis(rank: int) -> Any:
        return np.linalg.qr(rng.standard_normal((width, rank)))[0].astype(np.float32)

    first = layers // 3
    direction = vector()
    reading = Reading(
        Site(first, "residual"), direction[:, None] / np.linalg.norm(direction), vector()
    )
    edits = [
        Edit(
            Site(layer, "ffn_output"),
            "care",
            (Branch("visual", basis(16), vector(), 2.0), Branch("text", basis(8), vector(), 2.0)),
            fusion="adaptive",
        )
        for layer in range(first + 1, min(first + 4, layers))
    ]
    identity = ModelIdentity(family, layers, width, "0" * 64)
    sensor = Sensor((reading,), (threshold,))
    return GuardSpec(identity, "care", "sequence", (sensor,), tuple(edits), {})


def config_of(family: FamilyName, size: str) -> Any:
    """A VLM whose decoder has that shape; its vision tower is of no use."""
    shape = SHAPES[family, size]
    if family == "llava":
        text = LlamaConfig(
            hidden_size=shape.width,
            intermediate_size=shape.inner,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.groups,
            vocab_size=shape.vocabulary,
            max_position_embeddings=4096,
        )
        tower = CLIPVisionConfig(
            hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
        )
        return LlavaConfig(text_config=text, vision_config=tower)
    config: Any = AutoConfig.from_pretrained(models_root() / "tiny-qwen2_5_vl")
    text, head = config.text_config, shape.width // shape.heads
    text.hidden_size, text.intermediate_size = shape.width, shape.inner
    text.num_hidden_layers, text.vocab_size = shape.layers, shape.vocabulary
    text.num_attention_heads, text.num_key_value_heads = shape.heads, shape.groups
    text.head_dim, text.layer_types = head, ["full_attention"] * shape.layers
    third = head // 6
    text.rope_parameters["mrope_section"] = [head // 2 - 2 * third, third, third]
    config.vision_config.out_hidden_size = shape.width
    text.tie_word_embeddings = config.tie_word_embeddings = False
    return config


def _give_weights(graph: ir.Model, file: Path, shared: bool) -> int:
    """Turn parameters into random initializers; returns how many numbers they are."""
    given: dict[ir.Value, ir.TensorProtocol] = {}
    end = total = 0
    for value, _ in parameters_of(graph.graph):
        assert value.dtype is not None
        assert isinstance(value.shape, ir.Shape)
        dims = [int(size) for size in value.shape.numpy()]
        nbytes = prod(dims) * value.dtype.numpy().itemsize
        start = 0 if shared else -(-end // _PAGE) * _PAGE
        given[value] = ir.ExternalTensor(
            file.name, start, nbytes, value.dtype, shape=value.shape,
            name=str(value.name), base_dir=file.parent,
        )  # fmt: skip
        end, total = max(end, start + nbytes), total + prod(dims)
        kind = value.dtype
    _write_random(file, -(-end // kind.numpy().itemsize), kind)
    give_values(graph.graph, given)
    return total


def _write_random(file: Path, count: int, kind: ir.DataType) -> None:
    """Normal, of standard deviation 0.02, as a fresh model's weights are."""
    rng = np.random.default_rng(0)
    with file.open("wb") as out:
        for start in range(0, count, _BLOCK):
            drawn = rng.standard_normal(min(_BLOCK, count - start), np.float32)
            drawn *= 0.02
            out.write(drawn.astype(kind.numpy()).tobytes())
