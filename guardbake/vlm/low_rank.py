"""A refusal fine-tune: low-rank changes of the decoder's weights (LoRA, arXiv 2106.09685).

A rival of the table and no guard: it changes the model itself, cannot be taken out of it again nor
be seen in it, and no pass bakes it. Plain PyTorch, as a wrapper for one loop would be a dependency.
Trained are refusing turns after harmful requests and the model's own answers after harmless ones,
without which it learns to refuse everything.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import linear

from guardbake.errors import MalformedError
from guardbake.vlm.forced import Exchange, drawn, forced
from guardbake.vlm.load import Vlm
from guardbake.vlm.prompt import prepare
from guardbake.vlm.requests import Asking, batches
from guardbake.vlm.runner import Session

Progress = Callable[[int, int], None]

SCALE = 2.0
WARM_UP = 8  # steps until the rate is whole
CLIP = 1.0


@dataclass(frozen=True)
class Tuning:
    """rank of the change. steps of AdamW, each on `batch` exchanges of either label; the rate falls
    from `rate` to 0. seed: of the lower factors and of the order."""

    rank: int
    steps: int
    batch: int
    rate: float
    seed: int


@dataclass(frozen=True, eq=False)
class LowRank:
    """weight += SCALE * up @ down of each named linear layer; up [out, rank], down [rank, in],
    float32, by name inside the model."""

    down: Mapping[str, Tensor]
    up: Mapping[str, Tensor]

    @cached_property
    def digest(self) -> str:
        """sha256 over names and factors."""
        state = hashlib.sha256()
        for name in sorted(self.down):
            for factor in (self.down[name], self.up[name]):
                state.update(f"{name}:{tuple(factor.shape)}".encode())
                state.update(factor.contiguous().numpy().tobytes())
        return state.hexdigest()


@contextmanager
def merged(vlm: Vlm, change: LowRank | None) -> Iterator[None]:
    """While open, the model has the changed weights; then the very tensors it had before.

    Whole parameters are put in and taken out, so nothing is added and subtracted again, and a
    gradient's backward pass may come after the end. None: the model as it is. Raises MalformedError
    for a layer that the model does not have, before anything is changed.
    """
    modules = {} if change is None else _linear(vlm, change)
    kept = {name: module.weight for name, module in modules.items()}
    try:
        for name, module in modules.items():
            assert change is not None
            old = module.weight
            delta = SCALE * (change.up[name] @ change.down[name])
            new = (old.to(delta.dtype) + delta).to(old.dtype)
            module.weight = nn.Parameter(new, requires_grad=False)
        yield
    finally:
        for name, weight in kept.items():
            modules[name].weight = weight


def tune(
    vlm: Vlm, exchanges: Sequence[Exchange], asking: Asking, tuning: Tuning, progress: Progress
) -> LowRank:
    """Lower the surprise of the wanted turns: mean over exchanges of the mean over tokens.

    Every linear layer of the decoder's layers is changed. Deterministic for the same arguments.
    Raises MalformedError unless exchanges of both labels are given.
    """
    labels = {exchange.sample.label for exchange in exchanges}
    if labels != {"harmful", "harmless"}:
        raise _refuse(f"exchanges of {sorted(labels)}", "exchanges of both labels")
    change = _start(vlm, tuning)
    factors = [*change.down.values(), *change.up.values()]
    optimiser = torch.optim.AdamW(factors, lr=tuning.rate, weight_decay=0.0)
    some = drawn(exchanges, tuning.batch, tuning.seed)
    for step in range(tuning.steps):
        for group in optimiser.param_groups:
            fall = 1 - step / tuning.steps
            group["lr"] = tuning.rate * min(1.0, (step + 1) / WARM_UP) * fall
        loss = _loss(vlm, next(some), asking, change)
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(factors, CLIP)
        optimiser.step()
        progress(step + 1, tuning.steps)
    down, up = ({n: f.detach() for n, f in side.items()} for side in (change.down, change.up))
    return LowRank(down, up)


def save_low_rank(change: LowRank, path: Path) -> None:
    """One safetensors file."""
    named = {f"{name}.down": factor for name, factor in change.down.items()}
    save_file(named | {f"{name}.up": factor for name, factor in change.up.items()}, path)


def load_low_rank(path: Path) -> LowRank:
    """Read what `save_low_rank` wrote; MalformedError if the file is anything else."""
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise _refuse(type(error).__name__, "factors of a fine-tune", str(path)) from error
    sides = [
        {n.removesuffix(end): f for n, f in tensors.items() if n.endswith(end)}
        for end in (".down", ".up")
    ]
    if sides[0].keys() != sides[1].keys() or len(tensors) != 2 * len(sides[0]):
        raise _refuse("factors without their other half", "pairs of factors", str(path))
    return LowRank(*sides)


def _start(vlm: Vlm, tuning: Tuning) -> LowRank:
    """A change of zero: lower factors drawn, upper ones zero."""
    chance = torch.Generator().manual_seed(tuning.seed)
    down, up = {}, {}
    for name, module in vlm.model.named_modules():
        if isinstance(module, nn.Linear) and name.startswith(f"{vlm.family.layers}."):
            size = (tuning.rank, module.in_features)
            drawn_factor = torch.randn(size, generator=chance) / module.in_features**0.5
            down[name] = drawn_factor.requires_grad_()
            up[name] = torch.zeros(module.out_features, tuning.rank, requires_grad=True)
    return LowRank(down, up)


def _loss(vlm: Vlm, exchanges: Sequence[Exchange], asking: Asking, change: LowRank) -> Tensor:
    turns = forced([exchange.wanted for exchange in exchanges])
    samples = [exchange.sample for exchange in exchanges]
    ((_, batch),) = batches(vlm, samples, asking, len(samples))
    with torch.no_grad():
        prompt = prepare(vlm, batch)
    with _beside(vlm, change):
        surprise = turns.surprise(Session(vlm, prompt, None))
    return (surprise.sum(1) / turns.real.sum(1)).mean()


@contextmanager
def _beside(vlm: Vlm, change: LowRank) -> Iterator[None]:
    """The change as a second path beside each layer, through which gradients reach the factors."""
    with ExitStack() as stack:
        for name, module in _linear(vlm, change).items():
            hook = partial(_second_path, change.down[name], change.up[name])
            stack.callback(module.register_forward_hook(hook).remove)
        yield


def _second_path(down: Tensor, up: Tensor, _module: Any, inputs: Any, output: Tensor) -> Tensor:
    (x,) = inputs
    return output + SCALE * linear(linear(x.to(down.dtype), down), up).to(output.dtype)


def _linear(vlm: Vlm, change: LowRank) -> dict[str, nn.Linear]:
    modules = dict(vlm.model.named_modules())
    found = {}
    for name, down in change.down.items():
        module = modules.get(name)
        shape = (change.up[name].shape[0], down.shape[1])
        if not isinstance(module, nn.Linear) or tuple(module.weight.shape) != shape:
            raise _refuse(f"factors for {name}, {shape}", "factors of this model's linear layers")
        found[name] = module
    return found


def _refuse(found: str, expected: str, where: str = "the refusal fine-tune") -> MalformedError:
    return MalformedError(
        found=found,
        expected=expected,
        where=where,
        remedy="tune again on prompts of both labels, for this model",
    )
