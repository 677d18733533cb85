"""What tells two guards apart in their own terms: facts that changed, and how far arrays moved.

Two bases may differ in every number and span the same subspace; two thresholds may differ in the
last digit and decide alike. So beside the facts stand angles and cosines.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import scipy.linalg

from guardbake.spec import GuardSpec, header, tensors

Fact: TypeAlias = "str | int | float | bool | None"
Array = npt.NDArray[np.float64]
ABSENT = "-"


@dataclass(frozen=True)
class Changed:
    """One fact that differs; "-" where a side has none of it."""

    what: str
    before: Fact
    after: Fact


@dataclass(frozen=True)
class Moved:
    """One array that differs, by its name in the guard pack.

    degrees: principal angles between two subspaces, smallest first, or None of other arrays.
    cosines, lengths: of each column the cosine between both and the second one's relative length,
    NaN where a column is zero.
    """

    what: str
    degrees: tuple[float, ...] | None
    cosines: tuple[float, ...]
    lengths: tuple[float, ...]


def facts_of(spec: GuardSpec) -> dict[str, Fact]:
    """Everything but the numbers of arrays, by a name that says where it belongs."""
    facts: dict[str, Fact] = {"guard": spec.digest}
    facts |= dict(flatten(header(spec)))
    for name, array in tensors(spec).items():
        kind = "rank" if name.endswith(".basis") else "shape"
        facts[f"{name} {kind}"] = (
            array.shape[1] if kind == "rank" else "x".join(map(str, array.shape))
        )
    return facts


def flatten(value: Any, prefix: str = "") -> Iterator[tuple[str, Fact]]:
    """The leaves of a JSON value by path; a list's objects are called by their site or modality.

    >>> dict(flatten({"edits": [{"site": "layers.3.ffn_output", "kind": "add"}], "n": 3}))
    {'edits layers.3.ffn_output kind': 'add', 'n': 3}
    """
    if isinstance(value, Mapping):
        for key, each in value.items():
            yield from flatten(each, f"{prefix} {key}".strip())
    elif isinstance(value, list | tuple):
        for number, each in enumerate(value):
            keys = [
                key for key in ("site", "modality") if isinstance(each, Mapping) and key in each
            ]
            name = str(each[keys[0]]) if keys else str(number)
            rest = {k: v for k, v in each.items() if k not in keys} if keys else each
            yield from flatten(rest, f"{prefix} {name}".strip())
    else:
        yield prefix, value


def changes(before: Mapping[str, Fact], after: Mapping[str, Fact]) -> list[Changed]:
    """The facts that differ, in the order of `before`, then those that only `after` has."""
    names = [*before, *(name for name in after if name not in before)]
    pairs = ((name, before.get(name, ABSENT), after.get(name, ABSENT)) for name in names)
    return [Changed(*each) for each in pairs if each[1] != each[2]]


def movements(before: GuardSpec, after: GuardSpec) -> list[Moved]:
    """The arrays that both have, in one width, and that differ in a bit."""
    mine, theirs = tensors(before), tensors(after)
    found = []
    for name, array in mine.items():
        other = theirs.get(name)
        if other is None or other.shape[0] != array.shape[0] or _same(array, other):
            continue
        if name.endswith(".basis"):
            found.append(Moved(name, _angles(array, other), (), ()))
        elif other.shape == array.shape:
            found.append(_compare_columns(name, array, other))
    return found


def _same(a: npt.NDArray[np.float32], b: npt.NDArray[np.float32]) -> bool:
    return a.shape == b.shape and a.tobytes() == b.tobytes()


def _angles(a: npt.NDArray[np.float32], b: npt.NDArray[np.float32]) -> tuple[float, ...]:
    radians = scipy.linalg.subspace_angles(a.astype(np.float64), b.astype(np.float64))
    return tuple(sorted(float(angle) for angle in np.degrees(radians)))


def _compare_columns(name: str, a: npt.NDArray[np.float32], b: npt.NDArray[np.float32]) -> Moved:
    one, two = (each.astype(np.float64).reshape(len(each), -1) for each in (a, b))
    sizes = np.linalg.norm(one, axis=0), np.linalg.norm(two, axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        cosines = (one * two).sum(axis=0) / (sizes[0] * sizes[1])
        lengths = sizes[1] / sizes[0]
    return Moved(name, None, _floats(cosines), _floats(lengths))


def _floats(values: Array) -> tuple[float, ...]:
    return tuple(float(value) for value in values)
