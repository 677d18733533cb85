"""`python -m make_foreign TOOL ...`; see the package."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from make_foreign.multimodal import multimodal, multimodal_checkpoint

LAYERS, WIDTH, HEADS, KV_HEADS, HEAD_DIM = 2, 16, 2, 1, 16
KEPT = {".onnx", ".data"}
CONFIGS = {"genai_config.json", "config.json", "embedding.safetensors"}
TRACES = ("pkg.torch.onnx.stack_trace", "pkg.torch.onnx.fx_node", "pkg.onnxscript.stack_trace")


def checkpoint(target: Path) -> None:
    """A Llama of random weights with a tokenizer and a chat template, which Edge-LLM asks for."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    model = LlamaForCausalLM(config).eval()
    for weight in model.parameters():
        mean, spread = (1.0, 0.1) if weight.dim() == 1 else (0.0, WIDTH**-0.5)
        torch.nn.init.normal_(weight, mean, spread)
    model.save_pretrained(target)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(40)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="w0", bos_token="w1", eos_token="w2", pad_token="w2"
    )
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    tokenizer.save_pretrained(target)


def genai(source: Path, folders: Path) -> None:
    """fp32 and int8 with token ids, int4 with embeddings as a VLM has them, fp16 as for a GPU."""
    builds = {
        "genai-fp32": ("fp32", "cpu", []),
        "genai-fp16": ("fp16", "cuda", []),
        "genai-int8": ("int8", "cpu", ["int4_block_size=16"]),
        "genai-int4": ("int4", "cpu", ["int4_block_size=16", "exclude_embeds=true"]),
    }
    for name, (precision, device, options) in builds.items():
        with tempfile.TemporaryDirectory() as out:
            module = [sys.executable, "-m", "onnxruntime_genai.models.builder"]
            paths = ["-i", str(source), "-o", out, "-c", f"{out}/cache"]
            how = ["-p", precision, "-e", device, "--extra_options", "hf_token=false", *options]
            subprocess.run([*module, *paths, *how], check=True)
            keep(Path(out), folders / name)


def mobius(source: Path, folders: Path) -> None:
    """With standard operators, and with GroupQueryAttention."""
    command = [str(Path(sys.executable).with_name("mobius")), "build", "--config", str(source)]
    for device, name in (("default", "mobius"), ("cpu", "mobius-gqa")):
        with tempfile.TemporaryDirectory() as out:
            how = ["--ep", device, "--runtime", "ort-genai"]
            subprocess.run([*command, *how, f"{out}/built"], check=True)
            keep(Path(out, "built"), folders / name)


def optimum(source: Path, folders: Path) -> None:
    """Two graphs, without and with a cache, and both merged as the branches of one If."""
    import torch
    from optimum.exporters.onnx.convert import export_pytorch
    from optimum.exporters.onnx.model_configs import LlamaOnnxConfig
    from optimum.onnx import merge_decoders
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    with tempfile.TemporaryDirectory() as out:
        parts = [Path(out, "decoder_model.onnx"), Path(out, "decoder_with_past_model.onnx")]
        for path, cached in zip(parts, (False, True), strict=True):
            config = LlamaOnnxConfig(
                model.config, task="text-generation", use_past=True, use_past_in_inputs=cached
            )
            export_pytorch(model, config, opset=18, output=path)
        plain, merged = Path(out, "plain"), Path(out, "merged")
        for folder in (plain, merged):
            folder.mkdir()
            shutil.copy(source / "config.json", folder)
        (merged / "onnx").mkdir()
        whole = merged / "onnx" / "decoder_model_merged.onnx"
        merge_decoders(*parts, save_path=whole, strict=False)
        shutil.copy(parts[1], plain / "model.onnx")
        keep(plain, folders / "optimum")
        keep(merged, folders / "optimum-merged")


def onnxruntime(source: Path, folders: Path) -> None:
    """What onnxruntime saves of a traced graph when it optimises all it can: no metadata."""
    import onnxruntime as ort

    from make_foreign.traced import trace

    with tempfile.TemporaryDirectory() as out:
        trace(source, Path(out, "traced.onnx"))
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
        Path(out, "saved").mkdir()
        options.optimized_model_filepath = f"{out}/saved/model.onnx"
        ort.InferenceSession(f"{out}/traced.onnx", options, providers=["CPUExecutionProvider"])
        keep(Path(out, "saved"), folders / "onnxruntime-saved")


def edgellm(source: Path, folders: Path) -> None:
    """Packed tokens and the attention plugin of TensorRT Edge-LLM."""
    command = str(Path(sys.executable).with_name("tensorrt-edgellm-export"))
    with tempfile.TemporaryDirectory() as out:
        subprocess.run([command, str(source), out], check=True)
        keep(Path(out), folders / "edgellm")


def keep(made: Path, target: Path) -> None:
    """Graphs, weights and configuration; of the graphs, no paths of the machine they came from."""
    import onnx

    if target.exists():
        shutil.rmtree(target)
    for path in sorted(made.rglob("*")):
        if not path.is_file() or not (path.suffix in KEPT or path.name in CONFIGS):
            continue
        copy = target / path.relative_to(made)
        copy.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix != ".onnx":
            shutil.copyfile(path, copy)
            continue
        model = onnx.load(path, load_external_data=False)
        model.graph.name = Path(model.graph.name).name
        graphs = [model.graph]
        graphs += [a.g for n in model.graph.node for a in n.attribute if a.HasField("g")]
        for graph in graphs:
            for node in graph.node:
                node.ClearField("doc_string")
                notes = [p for p in node.metadata_props if p.key not in TRACES]
                del node.metadata_props[:]
                node.metadata_props.extend(notes)
        copy.write_bytes(model.SerializeToString(deterministic=True))


MADE = (checkpoint, genai, mobius, optimum, onnxruntime, edgellm, multimodal_checkpoint, multimodal)
TOOLS: dict[str, Callable[..., None]] = {tool.__name__: tool for tool in MADE}

if __name__ == "__main__":
    TOOLS[sys.argv[1]](*map(Path, sys.argv[2:]))
