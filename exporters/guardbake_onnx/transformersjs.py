"""Lay a model out for transformers.js: its file names, the sizes it knows, its configuration files.

Read off transformers.js 4.3.1. It opens three graphs in onnx/ by name, puts the image features in
the place of the image tokens itself, and makes an empty cache from the decoder's declared inputs,
of whose sizes it knows `batch_size` by that name and takes any other for zero. A Qwen2.5-VL's tower
it feeds the grids alone.

Two faults of it are not ours: the answer to a text without image it places too far behind in a
Qwen2.5-VL (the token after 11 at 33), which `_bound_positions` puts right; and after the prompt it
forgets which tokens are padding, in a Qwen2.5-VL always, in a LLaVA beside images. Ask these one
at a time.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from guardbake.bundle.canonical import canonical_lines
from guardbake.errors import UnsupportedError, UsageError
from guardbake.plugins import Number, Storage
from guardbake.vlm.files import read_json

from guardbake_onnx.checkpoint_papers import (
    PIXELS,
    PROCESSOR,
    TEMPLATE,
    TOKENIZER,
    TOKENIZER_CONFIG,
    missing_papers,
    tokenizer_config,
)
from guardbake_onnx.description import FILE_NAME, Description
from guardbake_onnx.embedding import look_up_alone
from guardbake_onnx.float_io import in_float32
from guardbake_onnx.grid_graph import read_grids
from guardbake_onnx.operators import Operators
from guardbake_onnx.tidy import rename_dimension
from guardbake_onnx.write import EXTERNAL_FROM

_GRAPHS = {"decoder": "decoder_model_merged", "vision": "vision_encoder"}
_GRAPHS |= {"embedding": "embed_tokens"}
# what JavaScript makes, merges or chooses from, whatever the graphs compute in
_FLOAT32 = ("pixel_values", "image_features", "inputs_embeds", "logits")
# what a number type is called in file names, and in the configuration
_NUMBERS = {ir.DataType.FLOAT: ("", "fp32"), ir.DataType.FLOAT16: ("_fp16", "fp16")}
_COPIED = (TEMPLATE, "generation_config.json", "special_tokens_map.json")


@dataclass(frozen=True)
class _Kind:
    """How its configuration calls a family's text model and image token, and its processor."""

    text: str
    image_token: str
    processor: str


_KINDS = {
    "llava": _Kind("llama", "image_token_index", "LlavaProcessor"),
    "qwen2_5_vl": _Kind("qwen2_5_vl_text", "image_token_id", "Qwen2_5_VLProcessor"),
}


def write_transformersjs(
    graphs: Mapping[str, ir.Model],
    description: Description,
    checkpoint: Path,
    image_token: str,
    folder: Path,
) -> None:
    """Write the graphs into folder/onnx, and beside it what transformers.js reads of a checkpoint.

    graphs: as captured, with their weights; changed here. checkpoint: the folder with the model's
    own configuration and tokenizer, which `admit` lets pass. image_token: as that tokenizer spells
    it.
    """
    number = _write_graphs(graphs, description, folder)
    config, kind = read_json(checkpoint / "config.json"), _KINDS[description.family]
    files = {
        "config.json": _config(config, description, kind, number),
        PIXELS: _pixels(checkpoint) | {"processor_class": kind.processor},
        PROCESSOR: _processor(config, description, kind, image_token),
        TOKENIZER_CONFIG: tokenizer_config(checkpoint),
    }
    for name, content in files.items():
        (folder / name).write_text(canonical_lines(content), encoding="utf-8")
    for name in (TOKENIZER, *_COPIED):
        if (checkpoint / name).is_file():
            shutil.copyfile(checkpoint / name, folder / name)
    (folder / FILE_NAME).write_text(description.to_json(), encoding="utf-8")


def _write_graphs(graphs: Mapping[str, ir.Model], description: Description, folder: Path) -> str:
    """Returns what the configuration calls the number type that they compute in."""
    computed = graphs["decoder"].graph.inputs[0].dtype
    suffix, number = _NUMBERS[computed or ir.DataType.UNDEFINED]
    look_up_alone(graphs["embedding"])
    if description.family == "qwen2_5_vl":
        read_grids(graphs["vision"], description.vision)
        _bound_positions(graphs["decoder"].graph)
    (folder / "onnx").mkdir()
    for role, name in _GRAPHS.items():
        rename_dimension(graphs[role].graph, "batch", "batch_size")
        in_float32(graphs[role].graph, _FLOAT32)
        path = folder / "onnx" / f"{name}{suffix}.onnx"
        ir.save(
            graphs[role],
            path,
            external_data=f"{path.name}_data",  # the name it looks for
            size_threshold_bytes=EXTERNAL_FROM,
        )
    return number


def _bound_positions(graph: ir.Graph) -> None:
    """No token stands further behind than it has real tokens before it.

    In mrope the tokens of an image share positions, so this holds for all that are right, and of
    text alone it is the right position: what this changes was wrong.
    """
    given = next(value for value in graph.inputs if value.name == "position_ids")
    mask = next(value for value in graph.inputs if value.name == "attention_mask")
    users, ops = list(given.uses()), Operators("positions")
    before = ops("Sub", ops("CumSum", mask, 1), 1)
    new = ops("Neg", ops("Shape", given, start=-1))
    most = ops("Max", ops("Slice", before, new, [np.iinfo(np.int64).max], [1]), 0)
    bound = ops("Min", given, most)
    bound.type, bound.shape = given.type, given.shape
    for user in users:
        user.node.replace_input_with(user.idx, bound)
    ops.insert(graph, graph[0])


def admit(checkpoint: Path, family: str, number: Number, storage: Storage) -> None:
    """UnsupportedError if transformers.js would not run the model, UsageError if the weights shall
    stay in the checkpoint's own files."""
    wrong, wanted = missing_papers(checkpoint), f"{TOKENIZER}, {TOKENIZER_CONFIG} and {PROCESSOR}"
    if family not in _KINDS:
        wrong, wanted = f"a {family}", f"one of {', '.join(sorted(_KINDS))}"
    elif number == "bfloat16":
        wrong, wanted = f"--dtype {number}", "float32 or float16, which its tensors can hold"
    if wrong is not None:
        raise UnsupportedError(
            found=wrong,
            expected=wanted,
            where=f"the export of {checkpoint} for transformers.js",
            remedy="export with --target ort, or save the checkpoint's processor beside it",
        )
    if storage == "zero-copy":
        raise UsageError(
            found="--weights zero-copy",
            expected="--weights stream: transformers.js looks for weights under names of its own",
            where=f"the export of {checkpoint} for transformers.js",
            remedy="leave --weights out, or export with --target ort",
        )


def _config(
    config: dict[str, Any], description: Description, kind: _Kind, number: str
) -> dict[str, Any]:
    """The checkpoint's, with what it may leave to Python's defaults, and how the files are found.

    A cache is named by num_hidden_layers; without it no cache is fed at all.
    """
    text = {
        "model_type": kind.text,
        **config.get("text_config", {}),
        "num_hidden_layers": description.layers,
        "num_key_value_heads": description.kv_heads,
    }
    return config | {
        kind.image_token: description.image_token_id,
        "text_config": text,
        "transformers.js_config": {"dtype": number, "use_external_data_format": True},
    }


def _pixels(checkpoint: Path) -> dict[str, Any]:
    """What transformers 5 nests in processor_config.json stands in a file of its own."""
    own = checkpoint / PIXELS
    if own.is_file():
        pixels = read_json(own)
    else:
        pixels = read_json(checkpoint / PROCESSOR).get("image_processor", {})
    return dict(pixels)


def _processor(
    config: dict[str, Any], description: Description, kind: _Kind, image_token: str
) -> dict[str, Any]:
    """How many image tokens a picture gets in a LLaVA: one a patch, one more if the class token
    stays. Python's processor subtracts that token again; transformers.js adds what is written here.
    """
    whole = config.get("vision_feature_select_strategy", "default") == "full"
    return {
        "image_token": image_token,
        "num_additional_image_tokens": int(whole),
        "patch_size": description.vision.patch_size,
        "processor_class": kind.processor,
    }
