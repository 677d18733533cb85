"""What one check of gpu.py left behind."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

Status = Literal["done", "not run", "failed"]


@dataclass(frozen=True)
class Outcome:
    """said: why it was not run or failed, or what there is to know. key: what it was run on."""

    status: Status
    said: str = ""
    figures: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    key: dict[str, str] = field(default_factory=dict)

    def write(self, path: Path) -> None:
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")
        partial.replace(path)


def read_outcome(path: Path) -> Outcome | None:
    """None if there is none yet."""
    if not path.is_file():
        return None
    return Outcome(**json.loads(path.read_text(encoding="utf-8")))
