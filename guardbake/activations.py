"""What capturing leaves for fitting: rows of activations, and whose they are. No torch here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from guardbake.errors import MalformedError
from guardbake.samples import Sample
from guardbake.site import Site

Rows = npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Activations:
    """One row a sample and site.

    samples: N of them. last[site] [N, d] float32: at the last prompt token, before anything is
    generated. image_mean[site] [N, d]: mean over the image tokens, NaN rows where there are none.
    """

    samples: Sequence[Sample]
    last: Mapping[Site, Rows]
    image_mean: Mapping[Site, Rows]

    def __post_init__(self) -> None:
        for rows in (*self.last.values(), *self.image_mean.values()):
            if len(rows) != len(self.samples):
                raise MalformedError(
                    found=f"{len(rows)} rows",
                    expected=f"{len(self.samples)}, one a sample",
                    where="captured activations",
                    remedy="capture again",
                )

    def where(self, keep: Callable[[Sample], bool]) -> npt.NDArray[np.bool_]:
        """[N] bool: the samples that `keep` is true for."""
        return np.array([keep(sample) for sample in self.samples], dtype=bool)
