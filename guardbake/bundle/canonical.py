"""JSON in one spelling, so that equal values are equal bytes; read strictly."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn, TypeAlias

from guardbake.errors import MalformedError
from guardbake.nesting import too_deep

JSON: TypeAlias = "bool | int | float | str | Sequence[JSON] | Mapping[str, JSON] | None"

MAX_BYTES = 16 << 20  # records of a bundle are kilobytes; anything larger is not ours


def canonical(value: JSON) -> str:
    """Sorted keys, no spaces, ASCII; raises ValueError on a number that is not finite.

    >>> canonical({"b": (1, 2.5), "a": None})
    '{"a":null,"b":[1,2.5]}'
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, default=_plain)


def canonical_lines(value: JSON) -> str:
    """The same, indented by two and with a newline at the end: for files that people read."""
    return json.dumps(value, sort_keys=True, indent=2, allow_nan=False, default=_plain) + "\n"


def digest_of(value: JSON) -> str:
    """sha256 of the canonical spelling, in hexadecimal."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()


def parse(data: bytes, where: str, remedy: str) -> Any:
    """The value that `data` spells.

    Raises MalformedError on anything that is not UTF-8 JSON, on a key given twice and on numbers
    that are not finite, which the json module would let pass.
    """

    def refuse(found: str) -> NoReturn:
        raise MalformedError(found=found, expected="strict JSON", where=where, remedy=remedy)

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        twice = [key for key, count in Counter(key for key, _ in items).items() if count > 1]
        if twice:
            refuse(f"the key {twice[0]!r:.80} twice")
        return dict(items)

    if len(data) > MAX_BYTES:
        refuse(f"{len(data)} bytes")
    try:
        value = json.loads(
            data.decode(),
            object_pairs_hook=pairs,
            parse_constant=lambda text: refuse(f"the number {text}"),
        )
    except UnicodeDecodeError as error:
        refuse(f"bytes that are not UTF-8 ({error.reason} at {error.start})")
    except ValueError as error:  # also a whole number of thousands of digits
        refuse(f"text that is not JSON ({error})")
    except RecursionError:
        refuse("JSON nested too deeply")
    if too_deep(value):
        refuse("JSON nested too deeply")
    return value


def _plain(value: object) -> dict[Any, Any]:
    """Mappings that are not dicts, for the json module."""
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"{type(value).__name__} is not a JSON value")
