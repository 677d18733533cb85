"""A planted fault: what it is, where it is planted, and which gate owns it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

Subject = TypeVar("Subject")
Place = Literal[
    "fit",
    "pack",
    "graph",
    "weights",
    "engine record",
    "certificate",
    "golden runs",
    "papers",
    "manifest",
    "runs",
]


@dataclass(frozen=True)
class Fault(Generic[Subject]):
    """gate: the name of the gate that must be the first to refuse. plant: does the harm in place,
    to a `FitCase`, a `RunCase` or a bundle's folder. Faults in packs and graphs, and those called
    mended, have certificate and manifest written again around them: digests alone do not tell.
    """

    name: str
    place: Place
    gate: str
    plant: Callable[[Subject], object]
