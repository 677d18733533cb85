"""Guarded against unguarded latency in PyTorch, the guard being hooks; used by gpu.py.

What latency-* does with graphs, done with the reference: the same shapes, tokens and guard. The
reference is written to be exact and to be read, not to be fast.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import torch
from gpu_latency import BATCHES, TOKENS
from gpu_outcome import Outcome
from random_decoders import SHAPES, FamilyName, config_of, random_guard
from torch import nn

from guardbake.spec import GuardSpec
from guardbake.vlm.catalog import family_of
from guardbake.vlm.hollow import hollow_from_config
from guardbake.vlm.load import Vlm
from guardbake.vlm.prompt import Prompt
from guardbake.vlm.runner import Session

ROUNDS, STEPS = 5, 40


def random_vlm(family: FamilyName, size: str, dtype: torch.dtype, device: str) -> Vlm:
    """Every parameter drawn on the device; buffers are the configuration's."""
    config = config_of(family, size)
    model = hollow_from_config(config, dtype)
    for module in model.modules():
        for name, empty in list(module.named_parameters(recurse=False)):
            drawn = torch.empty(empty.shape, dtype=dtype, device=device).normal_(0.0, 0.02)
            setattr(module, name, nn.Parameter(drawn, requires_grad=False))
    plain: nn.Module = model  # whose own to() is untyped
    plain.to(device)
    return Vlm(model, None, family_of(config), Path(), "")


def prompt_of(vlm: Vlm, batch: int, tokens: int) -> Prompt:
    """Random embeddings, no image, no padding, on the current default device."""
    model: Any = vlm.model
    table = model.get_input_embeddings().weight
    embeds = torch.randn(batch, tokens, table.shape[1], dtype=table.dtype)
    places = torch.arange(tokens).expand(batch, tokens)
    if vlm.family.position == "mrope":
        places = places.expand(3, batch, tokens)
    mask = torch.ones(batch, tokens, dtype=torch.long)
    return Prompt(embeds, places, mask, torch.zeros(batch, tokens, dtype=torch.bool))


@torch.no_grad()
def once(vlm: Vlm, prompt: Prompt, spec: GuardSpec | None) -> tuple[float, float]:
    """Seconds of a prefill, and of a decode step after it, the median of STEPS."""
    session = Session(vlm, prompt, spec)
    tokens = torch.zeros(len(prompt.mask), 1, dtype=torch.long)
    with session.guarded():
        started = time.perf_counter()
        session.logits(session.feed(prompt.mask.shape[1]))
        _wait()
        prefill, steps = time.perf_counter() - started, []
        for _ in range(STEPS):
            started = time.perf_counter()
            session.logits(session.step(tokens))
            _wait()
            steps.append(time.perf_counter() - started)
    return prefill, statistics.median(steps)


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _case(vlm: Vlm, spec: GuardSpec, batch: int, tokens: int, until: float) -> dict[str, Any]:
    """Rounds in turn, the first to warm up."""
    prompt = prompt_of(vlm, batch, tokens)
    arms: dict[str, GuardSpec | None] = {"guarded": spec, "unguarded": None}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in arms}
    for turn in range(ROUNDS + 1):
        if turn > 2 and time.monotonic() > until:
            break
        for name in list(arms)[:: 1 if turn % 2 else -1]:
            seconds = once(vlm, prompt, arms[name])
            if turn:
                times[name].append(seconds)
    found: dict[str, Any] = {"rounds": len(times["guarded"])}
    for place, kind in enumerate(("prefill", "decode")):
        median = {name: statistics.median(t[place] for t in times[name]) for name in arms}
        found[f"{kind}, guarded / unguarded"] = median["guarded"] / median["unguarded"]
        found[f"{kind}, unguarded ms"] = median["unguarded"] * 1e3
    return found


def check(family: FamilyName, size: str, cuda: bool, minutes: float, out: Path) -> Outcome:
    """Writes what it has into `out` after each batch size."""
    if cuda and not torch.cuda.is_available():
        return Outcome("not run", f"torch {torch.__version__} finds no CUDA device")
    until = time.monotonic() + 60 * minutes / 2
    device, dtype = ("cuda", torch.float16) if cuda else ("cpu", torch.float32)
    shape, figures = SHAPES[family, size], dict[str, Any]()
    with torch.device(device):
        vlm = random_vlm(family, size, dtype, device)
        spec = random_guard(family, shape.width, shape.layers)
        for batch in BATCHES:
            found = _case(vlm, spec, batch, TOKENS[size], until)
            figures[f"{TOKENS[size]} tokens, batch {batch}"] = found
            Outcome("failed", "cut off; what was measured until then", figures).write(out)
    return Outcome("done", f"torch {torch.__version__}, {dtype}", figures)
