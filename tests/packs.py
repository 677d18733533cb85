"""Guard packs, altered by hand."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load, save

from guardbake.artifact import load_guard
from guardbake.errors import MalformedError

Meta = dict[str, str]


def rewrite(
    path: Path,
    change: Callable[[dict[str, Any], dict[str, np.ndarray], Meta], None],
    own_digest: bool = True,
) -> None:
    """Change header, arrays or metadata; the digest in the metadata stays unless changed there."""
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    meta = json.loads(data[8 : 8 + length])["__metadata__"]
    head, arrays = json.loads(meta["guardbake"]), load(data)
    before = json.dumps(head)
    change(head, arrays, meta)
    if json.dumps(head) != before:
        meta["guardbake"] = json.dumps(head, sort_keys=True, separators=(",", ":"))
    path.write_bytes(save(arrays, meta))


def malformed(path: Path, says: str | None = None) -> None:
    with pytest.raises(MalformedError, match=says) as caught:
        load_guard(path)
    assert caught.value.exit_code == 9
