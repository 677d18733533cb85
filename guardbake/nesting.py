"""How deeply a JSON value may be nested: no file of ours comes near, and readers recurse."""

from __future__ import annotations

from typing import Any

MAX_DEPTH = 32


def too_deep(value: Any) -> bool:
    """Whether lists and objects lie more than MAX_DEPTH deep in a JSON value.

    >>> too_deep({"a": [1, [2]]})
    False
    """
    level: list[Any] = [value]
    for _ in range(MAX_DEPTH):
        inner = [each for each in level if isinstance(each, dict | list)]
        level = [x for each in inner for x in (each.values() if isinstance(each, dict) else each)]
    return any(isinstance(each, dict | list) for each in level)
