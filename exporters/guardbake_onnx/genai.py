"""Lay a model out for onnxruntime-genai: its configuration, its image processor, its tokenizer.

Read off onnxruntime-genai 0.18 and the extensions it is built with. It finds the places of images
in a prompt by the spelling of their marks, and lets a Gemma's image have 256 tokens.

What it does otherwise than Python is its own: it decodes JPEG files by another library, resizes a
Gemma's pictures with a level's difference here and there, rounds a side that lies halfway between
two multiples of a Qwen's tokens up, where Python takes the even one, reads a Qwen's pictures of
several sizes wrongly where a smaller one comes first, and gives a Qwen's padding token position 0
wherever it stands in a prompt.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from guardbake.bundle.canonical import JSON, canonical_lines
from guardbake.errors import UnsupportedError
from guardbake.plugins import Number
from guardbake.vlm.files import malformed, read_json

from guardbake_onnx.checkpoint_papers import (
    TEMPLATE,
    TOKENIZER,
    TOKENIZER_CONFIG,
    image_processor,
    missing_papers,
    tokenizer_config,
)
from guardbake_onnx.description import Description
from guardbake_onnx.genai_graphs import fit_genai, keep_images_apart, width

_CONFIG, _PIXELS = "genai_config.json", "processor_config.json"
_NAMES = {"decoder": "model", "embedding": "embedding", "vision": "vision"}
_COPIED = (TOKENIZER, TEMPLATE, "special_tokens_map.json")
# as the processor's resampling is numbered
_INTERPOLATIONS = ("NEAREST", "LANCZOS", "LINEAR", "CUBIC")
_STEPS = ("do_resize", "do_rescale", "do_normalize")
_SAMPLING = ("do_sample", "repetition_penalty", "temperature", "top_k", "top_p")


@dataclass(frozen=True)
class _Loop:
    """type: what genai calls a model that it runs like this. marks: the tokens that it looks for
    around an image, and the image token in their middle, as it spells them. tokens: of each image;
    0 if its size tells."""

    type: str
    marks: tuple[str, str, str]
    tokens: int = 0


_QWEN = "<|vision_start|>", "<|image_pad|>", "<|vision_end|>"
_LOOPS = {
    "gemma3": _Loop("gemma3", ("<start_of_image>", "<image_soft_token>", "<end_of_image>"), 256),
    "qwen2_5_vl": _Loop("qwen2_5_vl", _QWEN),
    "qwen2_vl": _Loop("qwen2_5_vl", _QWEN),
    "qwen3_vl": _Loop("qwen3_vl", _QWEN),
}


def lay_out(
    graphs: Mapping[str, ir.Model],
    description: Description,
    model: Any,
    pad: int | None,
    checkpoint: Path,
    folder: Path,
) -> dict[str, ir.Model]:
    """Fit the graphs to genai's loop and write beside them, into `folder`, what it reads.

    graphs: as captured, with their weights; changed here, and returned by the names that their
    files are to have. model: of transformers, without weights. pad: the tokenizer's padding token.
    Raises UnsupportedError for an image processor, and MalformedError for files, that genai could
    not follow.
    """
    loop = _LOOPS[description.family]
    pixels = _pixels(checkpoint, description)
    if not description.end_ids:
        raise _unsupported("no token that ends an answer", "eos_token_id", checkpoint)
    shared = fit_genai(graphs, description)
    if loop.tokens:
        keep_images_apart(graphs, loop.tokens, width(description))
    files = {
        _CONFIG: _config(model, description, loop, pad, shared),
        _PIXELS: pixels,
        TOKENIZER_CONFIG: tokenizer_config(checkpoint),
    }
    for name, content in files.items():
        (folder / name).write_text(canonical_lines(content), encoding="utf-8")
    for name in _COPIED:
        if (checkpoint / name).is_file():
            shutil.copyfile(checkpoint / name, folder / name)
    return {_NAMES[role]: graph for role, graph in graphs.items()}


def admit(checkpoint: Path, family: str, number: Number) -> None:
    """UnsupportedError if genai would not run the model, or would not find its images."""
    wrong = missing_papers(checkpoint)
    wanted = "tokenizer.json, tokenizer_config.json and processor_config.json"
    if family not in _LOOPS:
        wrong, wanted = f"a {family}", f"one of {', '.join(sorted(_LOOPS))}"
    elif number == "bfloat16":
        wrong, wanted = (
            f"--dtype {number}",
            "float32 or float16, which its CPU loop runs",
        )
    elif wrong is None:
        wrong, wanted = _unread(read_json(checkpoint / TOKENIZER), _LOOPS[family])
        tokens = read_json(checkpoint / "config.json").get("mm_tokens_per_image", 256)
        if wrong is None and _LOOPS[family].tokens not in (0, tokens):
            wrong, wanted = (
                f"images of {tokens} tokens",
                f"{_LOOPS[family].tokens}, as genai writes",
            )
    if wrong is not None:
        raise _unsupported(wrong, wanted, checkpoint)


def _unsupported(found: str, expected: str, checkpoint: Path) -> UnsupportedError:
    return UnsupportedError(
        found=found,
        expected=expected,
        where=f"the export of {checkpoint} for onnxruntime-genai",
        remedy="export with --target ort, whose runner is told of images by their ids",
    )


def _unread(tokenizer: Mapping[str, Any], loop: _Loop) -> tuple[str | None, str]:
    """What of a tokenizer genai does not read, None if it reads it, and what it would."""
    model, added = tokenizer.get("model"), tokenizer.get("added_tokens")
    kind = model.get("type") if isinstance(model, dict) else None
    if kind != "BPE":
        return f"a tokenizer of kind {kind!r:.40}", "byte-pair encoding (BPE)"
    tokens = added if isinstance(added, list) else []
    names = [token.get("content") for token in tokens if isinstance(token, dict)]
    missing = [mark for mark in loop.marks if mark not in names]
    if missing:
        return f"a tokenizer without {' and '.join(missing)}", f"the marks {' '.join(loop.marks)}"
    return None, ""


def _config(
    model: Any, description: Description, loop: _Loop, pad: int | None, shared: bool
) -> dict[str, JSON]:
    ends = list(description.end_ids)
    config, text = model.config, model.config.get_text_config()
    caches = {"key": "past_key_values.%d.key", "value": "past_key_values.%d.value"}
    fed = ["attention_mask", "inputs_embeds", "position_ids"]
    fed += ["input_ids"] if description.mask == "image" else []
    past = {f"past_{kind}_names": name for kind, name in caches.items()}
    present = {
        f"present_{kind}_names": name.replace("past_key_values", "present")
        for kind, name in caches.items()
    }
    decoder: dict[str, JSON] = {
        "filename": f"{_NAMES['decoder']}.onnx",
        "head_size": description.head_dim,
        "hidden_size": width(description),  # of the embeddings that it is fed
        "inputs": {name: name for name in fed} | past,
        "outputs": {"logits": "logits"} | present,
        "num_attention_heads": text.num_attention_heads,
        "num_hidden_layers": description.layers,
        "num_key_value_heads": description.kv_heads,
    }
    said: dict[str, JSON] = {
        "type": loop.type,
        "context_length": text.max_position_embeddings,
        "vocab_size": description.vocab,
        "eos_token_id": ends,
        "pad_token_id": ends[0] if pad is None else pad,  # one that no prompt has within it
        "image_token_id": description.image_token_id,
        "decoder": decoder,
        "embedding": {
            "filename": f"{_NAMES['embedding']}.onnx",
            "inputs": {name: name for name in ("input_ids", "image_features")},
            "outputs": {"inputs_embeds": "inputs_embeds"},
        },
        "vision": _vision(config.vision_config, description),
    }
    if text.bos_token_id is not None:
        said["bos_token_id"] = text.bos_token_id
    if description.position == "mrope":
        said["video_token_id"] = config.video_token_id
        said["vision_start_token_id"] = config.vision_start_token_id
    return {"model": said, "search": _search(model, text, shared)}


def _vision(vision: Any, description: Description) -> dict[str, JSON]:
    patched = description.position == "mrope"
    inputs = ["pixel_values", *(["image_grid_thw"] if patched else [])]
    said: dict[str, JSON] = {
        "filename": f"{_NAMES['vision']}.onnx",
        "config_filename": _PIXELS,
        "inputs": {name: name for name in inputs},
        "outputs": {"image_features": "image_features"},
    }
    if patched:
        said["patch_size"] = description.vision.patch_size
        said["spatial_merge_size"] = description.vision.merge
        said["tokens_per_second"] = float(getattr(vision, "tokens_per_second", 1.0))
    return said


def _search(model: Any, text: Any, shared: bool) -> dict[str, JSON]:
    """How transformers would generate, where the checkpoint says so; greedily else."""
    named = {name: getattr(model.generation_config, name, None) for name in _SAMPLING}
    said = {name: value for name, value in named.items() if value is not None}
    return {
        "do_sample": False,
        "max_length": text.max_position_embeddings,
        "past_present_share_buffer": shared,
        **said,
    }


def _pixels(checkpoint: Path, description: Description) -> dict[str, JSON]:
    """The image processor's steps, as the extensions call them."""
    processor = image_processor(checkpoint)
    off = [name for name in _STEPS if not getattr(processor, name, True)]
    off += ["do_pan_and_scan"] if getattr(processor, "do_pan_and_scan", False) else []
    if off:
        found = f"an image processor with another {', '.join(off)}"
        raise _unsupported(found, "one that resizes, rescales, normalises and no more", checkpoint)
    try:
        steps = _steps(processor, description)
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        said = f"{type(error).__name__}: {error}"[:200]
        raise malformed(said, "sizes, means and scales of pixels", checkpoint / _PIXELS) from error
    return {"processor": {"name": description.family, "transforms": steps}}


def _steps(processor: Any, description: Description) -> list[JSON]:
    geometry, size = description.vision, processor.size
    resize: dict[str, JSON] = {"interpolation": _INTERPOLATIONS[int(processor.resample)]}
    if geometry.image_size:
        resize |= {"height": size["height"], "width": size["width"], "keep_aspect_ratio": 0}
        last = _step("Permute3D", dims=[2, 0, 1])
    else:
        patches: dict[str, JSON] = {"patch_size": geometry.patch_size, "merge_size": geometry.merge}
        least, most = size["shortest_edge"], size["longest_edge"]  # of pixels, for all its name
        resize |= {"smart_resize": 1, "min_pixels": least, "max_pixels": most, **patches}
        last = _step("PatchImage", **patches, temporal_patch_size=processor.temporal_patch_size)
    return [
        _step("DecodeImage", color_space="RGB"),
        _step("Resize", **resize),
        _step("Rescale", rescale_factor=float(processor.rescale_factor)),
        _step("Normalize", mean=_floats(processor.image_mean), std=_floats(processor.image_std)),
        last,
    ]


def _floats(numbers: Sequence[float]) -> list[JSON]:
    return [float(number) for number in numbers]


def _step(kind: str, **attributes: JSON) -> JSON:
    return {"operation": {"name": kind.lower(), "type": kind, "attrs": attributes}}
