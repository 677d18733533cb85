"""A Qwen2.5-VL as mobius writes it for onnxruntime-genai: decoder, embedding and vision.

Two things of the folder are mended, or genai 0.18 would not run it: the model's type, and the rank
of the pixels, which it feeds with an axis more. The tokenizer is a BPE of single characters: genai
reads no word lists.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

SPECIAL = ("<pad>", "<unk>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>")
SPECIAL = (*SPECIAL, "<|image_pad|>", "<|video_pad|>")
LETTERS = " abcdefghijklmnopqrstuvwxyz"
WIDTH, PATCH = 16, 14


def multimodal_checkpoint(target: Path) -> None:
    """A Qwen2.5-VL of random weights: two layers of width 16, a tower of two."""
    import torch
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    torch.manual_seed(0)
    ids = {token: number for number, token in enumerate(SPECIAL)}
    text = {
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": len(SPECIAL) + len(LETTERS),
        "max_position_embeddings": 256,
        "layer_types": ["full_attention"] * 2,
        "rope_parameters": {"type": "mrope", "rope_type": "default", "rope_theta": 1e4}
        | {"mrope_section": [2, 1, 1]},
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": ids["<|im_end|>"],
        "pad_token_id": ids["<pad>"],
    }
    vision = {
        "depth": 2,
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_heads": 2,
        "out_hidden_size": WIDTH,
        "patch_size": PATCH,
        "window_size": 4 * PATCH,
        "fullatt_block_indexes": [1],
        "tokens_per_second": 4,
    }
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=False,
    )
    model = Qwen2_5_VLForConditionalGeneration(config).eval()
    for weight in model.parameters():
        mean, spread = (1.0, 0.1) if weight.dim() == 1 else (0.0, weight[0].numel() ** -0.5)
        torch.nn.init.normal_(weight, mean, spread)
    model.save_pretrained(target)
    write_tokenizer(target)
    like = Path(__file__).parents[2] / "models" / "tiny-qwen2_5_vl"
    processor = json.loads((like / "processor_config.json").read_text())
    processor["image_processor"]["patch_size"] = PATCH
    (target / "processor_config.json").write_text(json.dumps(processor, indent=2))
    shutil.copyfile(like / "chat_template.jinja", target / "chat_template.jinja")


def write_tokenizer(folder: Path) -> None:
    """tokenizer.json and tokenizer_config.json, as both transformers and genai read them."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    letters = LETTERS.replace(" ", "\u0120")  # a space, as byte-level BPE spells it
    vocabulary = {token: number for number, token in enumerate((*SPECIAL, *letters))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    tokenizer.save(str(folder / "tokenizer.json"))
    named = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"}
    named |= {"vision_start_token": "<|vision_start|>", "vision_end_token": "<|vision_end|>"}
    named |= {"eos_token": "<|im_end|>", "pad_token": "<pad>"}
    config = named | {"tokenizer_class": "Qwen2Tokenizer", "padding_side": "left"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2))


def multimodal(source: Path, folders: Path) -> None:
    """mobius with GroupQueryAttention, mended."""
    from make_foreign.__main__ import keep

    command = [str(Path(sys.executable).with_name("mobius")), "build", "--config", str(source)]
    with tempfile.TemporaryDirectory() as out:
        built = Path(out, "built")
        subprocess.run([*command, "--ep", "cpu", "--runtime", "ort-genai", str(built)], check=True)
        config = json.loads((built / "genai_config.json").read_text())
        original = json.loads((source / "config.json").read_text())
        mend_config(config, original)
        (built / "genai_config.json").write_text(json.dumps(config, indent=2))
        mend_pixels(built / "vision_encoder" / "model.onnx")
        keep(built, folders / "mobius-multimodal")
        for name in ("processor_config.json", "tokenizer.json"):
            shutil.copyfile(built / name, folders / "mobius-multimodal" / name)
        write_tokenizer(folders / "mobius-multimodal")


def mend_config(config: dict[str, Any], original: dict[str, Any]) -> None:
    """The type of a model with pictures, and what genai counts a picture's positions by."""
    model, vision = config["model"], original["vision_config"]
    model["type"] = original["model_type"]
    model["context_length"] = original["text_config"]["max_position_embeddings"]
    for key in ("vision_start_token_id", "video_token_id"):
        model[key] = original[key]
    for key in ("tokens_per_second", "patch_size", "window_size"):
        model["vision"][key] = vision[key]
    model["vision"]["tokens_per_second"] = float(vision["tokens_per_second"])
    config["search"] |= {"do_sample": False, "max_length": model["context_length"]}


def mend_pixels(path: Path) -> None:
    """genai feeds [1, patches, numbers] where the graph takes [patches, numbers]."""
    import numpy as np
    import onnx_ir as ir

    model = ir.load(path)
    graph = model.graph
    flat = next(value for value in graph.inputs if value.name == "pixel_values")
    assert flat.shape is not None
    fed = ir.Value(name="pixel_values", shape=ir.Shape([1, *flat.shape]), type=flat.type)
    sizes = ir.tensor(np.array([-1, flat.shape[-1]], np.int64), name="pixels/sizes")
    shape = ir.val("pixels/sizes", const_value=sizes)
    graph.register_initializer(shape)
    node = ir.node("Reshape", [fed, shape], name="pixels/flat")
    out = node.outputs[0]
    out.name, out.shape, out.type = "pixels/flat", flat.shape, flat.type
    ir.convenience.replace_all_uses_with(flat, out)
    graph.inputs[list(graph.inputs).index(flat)] = fed
    graph.insert_before(graph[0], node)
    ir.save(model, path)
