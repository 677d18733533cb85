"""Fit a model's graphs to onnxruntime-genai's loop, which hands on what it knows and nothing else.

Read off onnxruntime-genai 0.18. A Qwen's tower gets the patches and grids of the image processor.
One tensor passes from the tower to the embedding, one from there to the decoder, both as wide as
the configuration says: features for the first layers (deepstack) ride in further columns, zeros at
words. A decoder that asks for the token ids gets them, and tells by them which tokens see each
other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from guardbake_onnx.description import Description
from guardbake_onnx.grid_graph import read_grids
from guardbake_onnx.grouped import attends_alike, group_attention
from guardbake_onnx.operators import Operators

_FEATURES, _EMBEDS = "image_features", "inputs_embeds"


def fit_genai(graphs: Mapping[str, ir.Model], description: Description) -> bool:
    """Change decoder, embedding and vision, which are as captured, with their weights.

    Returns whether the loop may let one buffer be a layer's past and present.
    """
    decoder, embedding, vision = (graphs[name] for name in ("decoder", "embedding", "vision"))
    if description.deepstack:
        _join_levels(vision.graph, width(description))
        _widen_words(embedding.graph, description)
        _part_levels(decoder.graph, description)
    if description.position == "mrope":
        read_grids(vision, description.vision)
    if description.mask == "image":
        _see_by_ids(decoder.graph, description.image_token_id)
    shared = description.mask == "causal" and attends_alike(decoder)
    if shared:
        group_attention(decoder)
    return shared


def width(description: Description) -> int:
    """Columns of the features and embeddings that pass between the graphs."""
    return description.hidden * (1 + description.deepstack)


def keep_images_apart(graphs: Mapping[str, ir.Model], tokens: int, columns: int) -> None:
    """image_features leave the tower as [images, tokens, columns]; the embedding takes any rank.

    A loop that makes the tensor for the tower knows then that there are several images; without
    one it feeds [0, columns].
    """
    graph, ops = graphs["vision"].graph, Operators("images")
    (flat,) = graph.outputs
    apart = ops("Reshape", flat, [-1, tokens, columns])
    apart.type, apart.shape = flat.type, ir.Shape(["images", tokens, columns])
    flat.name, apart.name = f"{apart.name}/flat", flat.name
    graph.outputs[0] = apart
    ops.append(graph)
    graph, ops = graphs["embedding"].graph, Operators("images")
    old = _named(graph.inputs, _FEATURES)
    fed = ir.Value(name=_FEATURES, type=old.type)
    rows = ops("Reshape", fed, [-1, columns])
    _take_instead(graph, old, fed, rows)
    ops.insert(graph, graph[0])


def _join_levels(graph: ir.Graph, columns: int) -> None:
    """image_features [N, d] and deepstack_features [levels, N, d] leave as one, [N, columns]."""
    features, levels = graph.outputs
    ops = Operators("levels")
    rows = ops("Reshape", ops("Transpose", levels, perm=[1, 0, 2]), [0, -1])
    joined = ops("Concat", features, rows, axis=-1)
    joined.type, joined.shape = features.type, _as_wide(features, columns)
    features.name, joined.name = f"{joined.name}/first", features.name
    del graph.outputs[1]
    graph.outputs[0] = joined
    ops.append(graph)


def _widen_words(graph: ir.Graph, description: Description) -> None:
    """Words get zeros behind their embedding, so that features of more columns take their place."""
    columns = width(description)
    (out,) = graph.outputs
    choice = out.producer()
    assert choice is not None
    words, nothing = choice.inputs[2], graph.initializers["no_feature"]
    assert words is not None
    assert nothing.const_value is not None
    ops = Operators("levels")
    padded = ops("Pad", words, [0, 0, 0, 0, 0, columns - description.hidden])
    padded.type, padded.shape = out.type, _as_wide(out, columns)
    ops.insert(graph, choice)
    choice.replace_input_with(2, padded)
    zeros = np.zeros((1, columns), nothing.const_value.dtype.numpy())
    nothing.const_value = ir.tensor(zeros, name="no_feature")
    features = _named(graph.inputs, _FEATURES)
    for value in (nothing, features, out):
        value.shape = _as_wide(value, columns)


def _part_levels(graph: ir.Graph, description: Description) -> None:
    """inputs_embeds and deepstack_embeds come as one inputs_embeds [batch, seq, columns]."""
    d, levels = description.hidden, description.deepstack
    ops, old = Operators("levels"), _named(graph.inputs, _EMBEDS)
    fed = ir.Value(name=_EMBEDS, type=old.type, shape=_as_wide(old, width(description)))
    # cut, not split: what comes of the first columns alone is the residual stream
    first = ops("Slice", fed, [0], [d], [-1])
    rest = ops("Slice", fed, [d], [d + levels * d], [-1])
    apart = ops("Transpose", ops("Reshape", rest, [0, 0, levels, d]), perm=[2, 0, 1, 3])
    beside = _named(graph.inputs, "deepstack_embeds")
    _take_instead(graph, old, fed, first)
    _replace_uses(beside, apart)
    graph.inputs.remove(beside)
    ops.insert(graph, graph[0])


def _see_by_ids(graph: ir.Graph, image_token_id: int) -> None:
    """mutual_mask becomes what the token ids say: the tokens of an image see each other."""
    old = _named(graph.inputs, "mutual_mask")
    ids = ir.Value(name="input_ids", type=ir.TensorType(ir.DataType.INT64), shape=old.shape)
    ops = Operators("seeing")
    _take_instead(graph, old, ids, ops("Equal", ids, image_token_id))
    ops.insert(graph, graph[0])


def _take_instead(graph: ir.Graph, old: ir.Value, fed: ir.Value, made: ir.Value) -> None:
    """`fed` is the input in the place of `old`, and `made` of it what old's users read."""
    _replace_uses(old, made)
    graph.inputs[graph.inputs.index(old)] = fed


def _replace_uses(old: ir.Value, new: ir.Value) -> None:
    new.type, new.shape = old.type, old.shape
    ir.convenience.replace_all_uses_with(old, new)


def _named(values: Sequence[ir.Value], name: str) -> ir.Value:
    return next(value for value in values if value.name == name)


def _as_wide(value: ir.Value, columns: int) -> ir.Shape:
    assert value.shape is not None
    return ir.Shape([*list(value.shape)[:-1], columns])
