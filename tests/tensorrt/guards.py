"""Guards for the tiny decoders, put in and lowered."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from guardbake.passes.insert import InsertGuard
from guardbake.site import Site
from guardbake.spec import GuardSpec

from tests.tensorrt.conftest import Tiny

GATES = ("always", "token", "sequence", "pooling", "each", "replace")
HEAD, LAYERS = 32, 6


@dataclass(frozen=True)
class GuardedTiny:
    path: Path
    nodes: tuple[str, ...]


def guard_tiny(
    tiny: Tiny, guard: Callable[..., GuardSpec], gate: str, threshold: float = 0.0
) -> GuardedTiny:
    """A guard read after layer 2 that edits layers 3 and 4, in a file beside the plain one.

    gate: a profile; or of a sequence gate, "pooling" (its sensor averages over image tokens),
    "each" (a gate for either edit), "replace" (the edits are told what the prompt says).
    """
    spec = guard(
        gate if gate in ("always", "token") else "sequence",
        {"replace": "replace", "token": "astra"}.get(gate, "care"),
        width=tiny.width,
        layers=LAYERS,
        sensor=Site(2, "residual"),
        edits=(3, 4),
        threshold=threshold,
        pools=gate == "pooling",
        later=(Site(3, "residual"),) if gate == "each" else (),
    )
    model = ir.load(tiny.path)
    nodes = InsertGuard(spec)(model).nodes
    path = tiny.path.with_name(f"{gate}.{threshold}.onnx")
    ir.save(model, path)
    return GuardedTiny(path, nodes)
