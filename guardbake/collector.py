"""Python's search for garbage in cycles: dear where millions of objects come, and come to stay."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def no_collection() -> Iterator[None]:
    """Do not search in the body, such as imports of PyTorch (2.3 s instead of 2.9) and tracing."""
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
