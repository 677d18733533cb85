"""A bake as a user types it, and what it leaves, for whoever needs a finished bundle."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from guardbake.vlm.catalog import models_root

TINY = models_root() / "tiny-llava.toml"
MOVING = (
    "decoder.engine", "decoder.engine.json", "certificate.json", "sbom.cdx.json", "provenance.json",
)  # fmt: skip
OFFLINE = Path(__file__).with_name("offline.py")


@dataclass(frozen=True)
class Baked:
    """A finished bake: the bundle, the unguarded export it was made from, and what it said."""

    bundle: Path
    unguarded: Path
    output: str
    progress: str

    @property
    def seconds(self) -> dict[str, float]:
        """How long each stage took, in the order of the bake."""
        events = [json.loads(line) for line in self.progress.splitlines() if line.startswith("{")]
        return {e["stage"]: e["seconds"] for e in events if e["event"] == "end"}


def guardbake(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own, in which no socket can be made."""
    return subprocess.run(
        [sys.executable, OFFLINE, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )


def differing(one: Path, other: Path) -> list[str]:
    """The files in which two bundles of one recipe differ, the engine set aside.

    An engine is not the same twice, and so neither are its record, the certificate's copy of that
    record and what manifest and papers say of the three: those parts are not compared.
    """
    names = {_name(p, root) for root in (one, other) for p in root.rglob("*") if p.is_file()}
    return sorted(name for name in names if _content(one, name) != _content(other, name))


def _name(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix()


def _content(bundle: Path, name: str) -> Any:
    path = bundle / name
    if not path.is_file():
        return None
    if name in ("decoder.engine", "decoder.engine.json"):
        return "an engine"
    if name not in ("certificate.json", "manifest.json", "sbom.cdx.json", "provenance.json"):
        return path.read_bytes()
    content = json.loads(path.read_text())
    lists = {"manifest.json": "files", "sbom.cdx.json": "components", "provenance.json": "subject"}
    if name == "certificate.json":
        del content["figures"]["engine"]
    else:
        listed = content[lists[name]]
        content[lists[name]] = [entry for entry in listed if entry["name"] not in MOVING]
    if name == "manifest.json":
        del content["chain"]["engine"], content["chain"]["certificate"]
    if name == "sbom.cdx.json":
        del content["serialNumber"]  # drawn from all digests
    return content
