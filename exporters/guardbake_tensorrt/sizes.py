"""From sizes that people name to the shapes of a graph's inputs.

A decoder's inputs are known by name (`EngineProfile`). Those of a vision tower or an embedding say
what they are by the names of their dimensions: `images`, `4*tokens`.
"""

from __future__ import annotations

import onnx_ir as ir

from guardbake.errors import UnsupportedError
from guardbake.plugins import EngineSizes, Range

from guardbake_tensorrt.profile import EngineProfile, Phase

# Qwen2.5-VL's tower attends in windows of at most 4 x 4 merged patches.
_WINDOW = 16


def profile_for(model: ir.Model, sizes: EngineSizes, growing: bool) -> EngineProfile:
    """The profile of a graph of ours: for a decoder several phases, for any other graph one.

    growing: the decoder's cache grows, so that a call's shapes tell whether it is empty. Raises
    UnsupportedError at a dimension that means nothing known, UsageError at sizes that do not
    ascend.
    """
    if any(value.name == "logits" for value in model.graph.outputs):
        phases = _phases(sizes.past) if growing else ("prefill", "decode")
        return EngineProfile(sizes.batch, sizes.sequence, sizes.past, phases)
    known = _dimensions(sizes)
    inputs = tuple((str(value.name), *_shapes(value, known)) for value in model.graph.inputs)
    return EngineProfile(sizes.batch, sizes.sequence, sizes.past, inputs=inputs)


def _phases(past: Range) -> tuple[Phase, ...]:
    """Those that occur with so many tokens in a growing cache."""
    empty: tuple[Phase, ...] = () if past[0] else ("prefill",)
    return empty if not past[2] else (*empty, "continued", "decode")


def _dimensions(sizes: EngineSizes) -> dict[str, Range]:
    tokens, images = sizes.image_tokens, sizes.images
    prompt = sizes.batch[2] * sizes.sequence[2]
    best_windows = -(-tokens[1] // _WINDOW)
    return {
        "batch": sizes.batch,
        "seq": sizes.sequence,
        "images": images,
        "tokens": tokens,
        "features": (0, min(tokens[1], prompt), prompt),  # a prompt without images has none
        # where images and windows end, the start included
        "segments": (2, images[1] + 1, images[2] + 1),
        "windows": (2, best_windows + 1, tokens[2] + 1),
    }


def _shapes(
    value: ir.Value, known: dict[str, Range]
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    ranges = [_range(dimension, value, known) for dimension in value.shape or ()]
    least, best, most = (tuple(each[step] for each in ranges) for step in range(3))
    return least, best, most


def _range(dimension: int | ir.SymbolicDim, value: ir.Value, known: dict[str, Range]) -> Range:
    """The range of one dimension: a number, a name, or a multiple of a name."""
    if isinstance(dimension, int):
        return (dimension, dimension, dimension)
    factor, _, name = (dimension.value or "").rpartition("*")
    if name not in known or not (factor or "1").isdigit():
        raise UnsupportedError(
            found=f"input {value.name!r} with a dimension {dimension.value!r}",
            expected=f"{', '.join(known)}, or a multiple of one of them",
            where="the choice of engine sizes",
            remedy="compile a graph that guardbake exported, or give its dimensions these names",
        )
    least, best, most = known[name]
    times = int(factor or 1)
    return (times * least, times * best, times * most)
