"""What capturing leaves for fitting: rows of activations, and whose they are. No torch here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt

from guardbake.errors import MalformedError
from guardbake.samples import Sample
from guardbake.site import Site

Rows = npt.NDArray[np.float32]
P = TypeVar("P")


class Parts(Generic[P]):
    """Rows [B, d] of one batch after another, by place."""

    def __init__(self) -> None:
        self._parts: dict[P, list[Rows]] = {}

    def add(self, place: P, rows: Rows) -> None:
        """Keeps a copy: a view of the last tokens would keep every token's row in memory."""
        self._parts.setdefault(place, []).append(rows.copy())

    def joined(self) -> dict[P, Rows]:
        """rows[place] [N, d], batch after batch."""
        return {place: np.concatenate(parts) for place, parts in self._parts.items()}


@dataclass(frozen=True, eq=False)
class Activations:
    """One row a sample and site.

    samples: N of them. last[site] [N, d] float32: at the last prompt token, before anything is
    generated. image_mean[site] [N, d]: mean over the image tokens, NaN rows where there are none.
    image_attributed[site], text_attributed[site] [N, d]: mean over the tokens that attribution
    chose (see `diagnose.attribution`), at the sites it was asked for.
    """

    samples: Sequence[Sample]
    last: Mapping[Site, Rows]
    image_mean: Mapping[Site, Rows]
    image_attributed: Mapping[Site, Rows] = field(default_factory=dict)
    text_attributed: Mapping[Site, Rows] = field(default_factory=dict)

    def __post_init__(self) -> None:
        kinds = (self.last, self.image_mean, self.image_attributed, self.text_attributed)
        for rows in (rows for kind in kinds for rows in kind.values()):
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


@dataclass(frozen=True, eq=False)
class Turns:
    """One row a forced assistant turn and site, [N, d] float32.

    mean[site]: over the turn's tokens. attributed[site]: over those that attribution chose, at the
    sites it was asked for.
    """

    mean: Mapping[Site, Rows]
    attributed: Mapping[Site, Rows] = field(default_factory=dict)


def rows_at(kind: Mapping[Site, Rows], site: Site, where: str) -> Rows:
    """kind[site], or a MalformedError: rows of another boundary are never taken instead."""
    if site not in kind:
        raise MalformedError(
            found=f"rows captured at {', '.join(map(str, kind)) or 'no site'}",
            expected=f"rows at {site}, the tensor that is edited",
            where=where,
            remedy="capture at that site: a subspace of one boundary is weak at the other",
        )
    return kind[site]
