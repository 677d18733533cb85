"""A small certificate in full form, for tests of whoever reads one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

from guardbake.check.certificate import Gate, certificate

PARITY = {
    "passed": True,
    "comparisons": [
        {
            "gate": "logits",
            "quantity": "logits, decode",
            "worst": 1.5e-5,
            "limit": 1e-4,
            "compared": 96,
            "where": "batch 0, row 1, token 2",
            "source": "float32 of another summation order",
            "passed": True,
        }
    ],
    "flips_in_band": 0,
    "decisions": 48,
    "margins": {"smallest": 0.1, "5 %": 0.2, "median": 0.5},
    "histogram": [
        {"above": 0.0, "below": 1.0, "decisions": 40},
        {"above": 1.0, "below": None, "decisions": 8},
    ],
}
GATES = (
    Gate("presence", "pass", "3 guard nodes"),
    Gate("logits", "pass", "logits, decode 1.5e-05 of 0.0001"),
    Gate("cache", "not asked", "the recipe declares no budget"),
)


def small_certificate(
    model: str, guard: str, onnx: Mapping[str, str], gates: Sequence[Gate] = GATES
) -> dict[str, Any]:
    """Says of a guard of 64 hexadecimal digits, and of graphs by file name, what `gates` say."""
    digests = {"model": model, "guard": guard, "onnx": dict(onnx)}
    empty: dict[str, Any] = {"fit": {}, "rewrite": {}, "behaviour": {}, "engine": "none"}
    return certificate("small", gates, digests, {**empty, "parity": deepcopy(PARITY)})
