"""What decoding asks of whatever executes a graph: onnxruntime on some device, or an engine."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class GraphInput:
    """shape: None where the size is for the caller to choose. bfloat16 is that of ml_dtypes."""

    dtype: np.dtype[Any]
    shape: tuple[int | None, ...]


class Resident(Protocol):
    """A tensor in the memory of the device that computed it; released with its last reference."""

    def numpy(self) -> Array:
        """A copy in host memory."""
        ...


class Executor(Protocol):
    """One loaded graph.

    inputs: by name, in the graph's order. outputs: names, in the graph's order. rows: sequences of
    a call at most, and tokens: of each, None for any number. settings: in words, what computes and
    how precisely.
    """

    inputs: Mapping[str, GraphInput]
    outputs: tuple[str, ...]
    rows: int | None
    tokens: int | None
    settings: str

    def run(
        self, feeds: Mapping[str, Array], carried: Mapping[str, Resident], keep: Set[str]
    ) -> tuple[dict[str, Array], dict[str, Resident]]:
        """(outputs in host memory, outputs that stay on the device), each by name.

        feeds: inputs from host memory. carried: inputs that an earlier call of this executor left
        on the device; they are spent by this call, which may write in their place. keep: the
        outputs that stay.
        """
        ...
