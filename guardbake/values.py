"""What a guard is made of, checked as it comes in: arrays, numbers, names and JSON values."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NoReturn, cast

import numpy as np
import numpy.typing as npt

from guardbake.errors import MalformedError

Vector = npt.NDArray[np.float32]


def refuse(where: str, found: str, expected: str) -> NoReturn:
    raise MalformedError(
        found=found, expected=expected, where=where, remedy="fit the guard again with guardbake fit"
    )


def vector(array: npt.ArrayLike, shape: tuple[int | None, ...], where: str) -> Vector:
    """A read-only float32 copy of `array`, or an error naming `where`."""
    raw = np.asarray(array)
    if raw.dtype != np.float32:
        refuse(where, f"dtype {raw.dtype}", "float32")
    if raw.ndim != len(shape) or any(
        want not in (None, got) for want, got in zip(shape, raw.shape, strict=True)
    ):
        refuse(where, f"shape {raw.shape}", f"shape {shape}")
    if not np.isfinite(raw).all():
        refuse(where, "a value that is not finite", "finite numbers")
    out = np.array(raw, dtype=np.float32, order="C")
    out.setflags(write=False)
    return out


def shows(text: str) -> bool:
    """Whether a terminal shows the text as what it is: no escapes, no control characters."""
    return len(text) <= 256 and text.isprintable()


def finite(value: float, where: str) -> None:
    if not np.isfinite(value):
        refuse(where, repr(value), "a finite number")


def json_copy(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A deep copy that nobody else can change, or an error if it is not JSON."""
    try:
        plain = dict(values) if isinstance(values, Mapping) else values
        copy = json.loads(json.dumps(plain, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        refuse(where, str(error), "JSON values")
    if not isinstance(copy, dict):
        refuse(where, f"a JSON {type(copy).__name__}", "a JSON object")
    return cast(dict[str, Any], copy)
