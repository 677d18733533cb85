"""Ways from a checkpoint to ONNX, side by side: wall, processor time and memory of each.

    python tools/bench/export.py WORK [--size 0.8b] [--number float32] [--others PYTHON | --ours]

Makes a Qwen2.5-VL checkpoint of random weights in several shards in WORK, once, and runs every way
on it in a process of its own, one after the other; then captures the graphs of a LLaVA-1.5-7B,
whose configuration is written here and whose weights exist nowhere. --others: an interpreter with
onnxruntime-genai and mobius-onnx. --ours: copies and guardbake alone, for a checkpoint that the
others have no memory for. Rows that could not be run say why.

Wall depends on what else the machine does; processor time (user) and the largest resident memory,
of all processes of a way together, much less. Ours write decoder, vision and embedding, mobius too;
torch and the genai builder write the decoder alone; for genai ours and mobius write its
configuration too. "copied" is `cp` of the checkpoint, "copied, flushed" brings it to the disk, as
ours do.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
SHARD = 1 << 30  # bytes
# width, layers, heads, key-value heads, FFN width, vocabulary
SIZES = {
    "tiny": (128, 4, 4, 2, 384, 512),
    "0.8b": (1536, 24, 12, 12, 4096, 32064),
    "3b": (2560, 32, 20, 20, 8704, 32064),
    "7b": (4096, 32, 32, 32, 11008, 32064),
}


@dataclass(frozen=True)
class Row:
    way: str
    wall: float
    user: float
    system: float
    memory: float
    written: float
    failed: str = ""


def measure(way: str, command: Sequence[str], out: Path, log: Path) -> Row:
    """Run one way as a process; sizes in GB. `out` is what it writes, removed afterwards.

    This process imports nothing heavy: a child's peak counts from before it becomes its command.
    """
    os.sync()
    started, most = time.monotonic(), 0
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
        while not (ended := os.wait4(process.pid, os.WNOHANG))[0]:
            most = max(most, resident(process.pid))
            time.sleep(0.02)
    _, status, used = ended
    wall = time.monotonic() - started
    failed = f"exit {os.waitstatus_to_exitcode(status)}, see {log.name}" if status else ""
    written = sum(
        p.stat().st_size for p in out.rglob("*") if p.is_file() and p.stat().st_nlink == 1
    )
    shutil.rmtree(out, ignore_errors=True)
    memory = max(most, used.ru_maxrss * 1024) / 1e9
    return Row(way, wall, used.ru_utime, used.ru_stime, memory, written / 1e9, failed)


def resident(pid: int) -> int:
    """Bytes that a process and those it began have in memory; pages that they share count twice."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        begun = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/children")]
    except (OSError, IndexError):  # it has just ended
        return 0
    children = [int(child) for each in begun for child in each.split()]
    return pages * os.sysconf("SC_PAGE_SIZE") + sum(resident(child) for child in children)


def ways(
    work: Path, checkpoint: Path, number: str, others: str | None, ours_alone: bool
) -> list[Row]:
    """Every way on one checkpoint, one after the other."""
    here, out = [sys.executable, str(Path(__file__).resolve())], work / "out"
    ours = [sys.executable, "-m", "guardbake", "export", str(checkpoint), "-o", str(out)]
    ours += ["--dtype", number, "--progress", "plain", "--weights"]
    commands: dict[str, list[str]] = {
        "copied": ["cp", "-r", str(checkpoint), str(out)],
        "copied, flushed": [
            "sh",
            "-c",
            'cp -r "$0" "$1" && sync -f "$1"',
            str(checkpoint),
            str(out),
        ],
        "guardbake, streamed": [*ours, "stream"],
        "guardbake, streamed, captured before": [*ours, "stream"],
        "guardbake, zero-copy": [*ours, "zero-copy"],
        "guardbake, zero-copy, captured before": [*ours, "zero-copy"],
        "guardbake, for genai, streamed": [*ours, "stream", "--target", "genai"],
        "guardbake, for genai, zero-copy": [*ours, "zero-copy", "--target", "genai"],
        "torch.onnx.export": [*here, str(work), "--whole", str(checkpoint), "--number", number],
    }
    if others:
        builder = [others, "-m", "onnxruntime_genai.models.builder", "-i", str(checkpoint)]
        precision = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}[number]
        provider = "cpu" if number == "float32" else "cuda"
        builder += ["-o", str(out), "-p", precision, "-e", provider, "-c", str(work / "cache")]
        commands["onnxruntime-genai builder"] = [
            *builder,
            "--extra_options",
            "hf_token=false",
            "exclude_embeds=true",
        ]
        mobius = str(Path(others).parent / "mobius")
        mobius_out = ["--ep", "cpu", "--runtime", "ort-genai", str(out)]
        commands["mobius"] = [mobius, "build", "--config", str(checkpoint), *mobius_out]
    if ours_alone:
        commands = {
            way: c for way, c in commands.items() if way.startswith(("copied", "guardbake"))
        }
    rows = []
    for place, (way, command) in enumerate(commands.items()):
        if way.startswith("guardbake") and "before" not in way:
            shutil.rmtree(work / ".guardbake", ignore_errors=True)
        rows.append(measure(way, command, out, work / f"{place}.log"))
        print(row_text(rows[-1]), file=sys.stderr, flush=True)
    if not others and not ours_alone:
        missing = "not run: no --others"
        rows += [Row(w, 0, 0, 0, 0, 0, missing) for w in ("onnxruntime-genai builder", "mobius")]
    return rows


def make_checkpoint(folder: Path, size: str, number: str) -> None:
    """A Qwen2.5-VL of random weights, the tiny one's tower and a tokenizer that genai reads too, in
    shards of 1 GiB."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig

    from guardbake.vlm.hollow import hollow_from_config

    tiny = ROOT / "models" / "tiny-qwen2_5_vl"
    folder.mkdir(parents=True)
    for path in tiny.iterdir():
        if path.suffix in (".json", ".jinja"):
            shutil.copyfile(path, folder / path.name)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(ROOT / "tests" / "foreign" / "qwen2_5_vl" / name, folder / name)
    config: Any = AutoConfig.from_pretrained(tiny)
    text = config.text_config
    width, text.num_hidden_layers, heads, groups, text.intermediate_size, vocabulary = SIZES[size]
    text.hidden_size, text.num_attention_heads, text.num_key_value_heads = width, heads, groups
    text.vocab_size, text.head_dim = vocabulary, width // heads
    text.layer_types = ["full_attention"] * text.num_hidden_layers
    text.rope_parameters["mrope_section"] = [width // heads // 2 - 2 * (width // heads // 6)] + [
        width // heads // 6
    ] * 2
    config.vision_config.out_hidden_size, text.tie_word_embeddings = width, False
    config.tie_word_embeddings = False
    config.dtype = text.dtype = number
    config.save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    model = hollow_from_config(config, getattr(torch, number))
    shard: dict[str, Any] = {}
    index: dict[str, str] = {}
    full = 0
    for name, parameter in model.named_parameters():
        tensor = torch.randn(parameter.shape, generator=generator).mul_(0.02)
        # the keys that save_pretrained writes
        key = name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")
        shard[key] = tensor.to(parameter.dtype)
        full += shard[key].nbytes
        if full >= SHARD:
            index |= _save(shard, folder, len(set(index.values())), save_file)
            shard, full = {}, 0
    index |= _save(shard, folder, len(set(index.values())), save_file)
    record = json.dumps({"metadata": {}, "weight_map": index})
    (folder / "model.safetensors.index.json").write_text(record)


def _save(shard: dict[str, Any], folder: Path, number: int, save_file: Any) -> dict[str, str]:
    name = f"model-{number:05}.safetensors"
    save_file(shard, folder / name, metadata={"format": "pt"})
    return dict.fromkeys(shard, name)


def export_whole(checkpoint: Path, number: str, out: Path) -> None:
    """What one writes without guardbake: the model in memory, its decoder through torch.onnx."""
    import torch
    from torch.export import Dim
    from transformers import AutoModelForImageTextToText, DynamicCache

    kind = getattr(torch, number)
    auto: Any = AutoModelForImageTextToText
    model = auto.from_pretrained(checkpoint, dtype=kind).eval()

    class Decoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.language_model, self.lm_head = model.model.language_model, model.lm_head

        def forward(
            self, inputs_embeds: Any, attention_mask: Any, position_ids: Any, past: Any
        ) -> Any:
            cache: Any = DynamicCache([(key, value) for key, value in past])
            hidden = self.language_model(
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=cache,
                use_cache=True,
            ).last_hidden_state
            return self.lm_head(hidden), [(layer.keys, layer.values) for layer in cache.layers]

    text = model.config.text_config
    batch, seq, held, layers = Dim("batch"), Dim("seq"), Dim("past"), text.num_hidden_layers
    shape = (2, text.num_key_value_heads, 3, text.hidden_size // text.num_attention_heads)
    inputs = {
        "inputs_embeds": torch.zeros(2, 5, text.hidden_size, dtype=kind),
        "attention_mask": torch.ones(2, 8, dtype=torch.int64),
        "position_ids": torch.zeros(3, 2, 5, dtype=torch.int64),
        "past": [(torch.zeros(shape, dtype=kind),) * 2 for _ in range(layers)],
    }
    dynamic = {
        "inputs_embeds": {0: batch, 1: seq},
        "attention_mask": {0: batch, 1: Dim.DYNAMIC},
        "position_ids": {1: batch, 2: seq},
        "past": [({0: batch, 2: held}, {0: batch, 2: held})] * layers,
    }
    with torch.no_grad():
        program = torch.onnx.export(
            Decoder().eval(),
            (),
            kwargs=inputs,
            dynamic_shapes=dynamic,
            opset_version=23,
            dynamo=True,
        )
    out.mkdir()
    assert program is not None
    program.save(out / "decoder.onnx", external_data=True)


def write_llava_7b(folder: Path) -> None:
    """LLaVA-1.5-7B's configuration; there are no weights."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

    text: Any = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32}
    text |= {"num_attention_heads": 32, "vocab_size": 32064, "max_position_embeddings": 4096}
    vision: Any = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24}
    vision |= {"num_attention_heads": 16, "image_size": 336, "patch_size": 14}
    config = LlavaConfig(text_config=LlamaConfig(**text), vision_config=CLIPVisionConfig(**vision))
    config.save_pretrained(folder)


def capture(config: Path, out: Path) -> None:
    from guardbake.plugins import find_exporter

    out.mkdir()
    find_exporter("onnx").capture(config, "float16", out)


def row_text(row: Row) -> str:
    if row.failed:
        return f"| {row.way} | {row.failed} | | | | |"
    figures = f"{row.wall:.1f} | {row.user:.1f} | {row.system:.1f} | {row.memory:.2f}"
    return f"| {row.way} | {figures} | {row.written:.2f} |"


def machine() -> str:
    names = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    loads = ", ".join(f"{load:.1f}" for load in os.getloadavg())
    return (
        f"{len(names)} x {names[0]}, {memory:.0f} GB, Python {platform.python_version()}, "
        f"load {loads}, OMP_NUM_THREADS {os.environ.get('OMP_NUM_THREADS', 'unset')}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("--size", choices=SIZES, default="0.8b")
    parser.add_argument("--number", choices=("float32", "float16"), default="float32")
    parser.add_argument("--others", help="an interpreter with onnxruntime-genai and mobius-onnx")
    parser.add_argument("--ours", action="store_true", help="copies and guardbake alone")
    parser.add_argument("--whole", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--capture", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--llava", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    work, number = arguments.work, arguments.number
    if arguments.whole:
        return export_whole(arguments.whole, number, work / "out")
    if arguments.capture:
        return capture(arguments.capture, work / "out")
    if arguments.llava:
        return write_llava_7b(arguments.llava)
    if arguments.make:
        return make_checkpoint(arguments.make, arguments.size, number)
    checkpoint = work / f"{arguments.size}-{number}"
    here = [sys.executable, str(Path(__file__).resolve()), str(work), "--size", arguments.size]
    if not checkpoint.is_dir():
        subprocess.run([*here, "--number", number, "--make", str(checkpoint)], check=True)
    llava = work / "llava-1.5-7b"
    if not llava.is_dir():
        subprocess.run([*here, "--llava", str(llava)], check=True)
    if not Path(f"/proc/self/task/{os.getpid()}/children").is_file():
        sys.exit("no /proc/PID/task/PID/children here, which tells whose memory belongs together")
    print(f"{machine()}; {checkpoint.name}\n")
    rows = ways(work, checkpoint, number, arguments.others, arguments.ours)
    rows.append(
        measure(
            "LLaVA-1.5-7B, captured alone",
            [*here, "--capture", str(llava)],
            work / "out",
            work / "capture.log",
        )
    )
    print("| way | wall s | user s | system s | peak RSS GB | written GB |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        print(row_text(row))


if __name__ == "__main__":
    main()
