"""What changed between two guards, for whoever reviews the change: packs, or the bundles of two."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from guardbake.artifact import load_guard
from guardbake.bundle.manifest import CERTIFICATE, GUARD, MANIFEST, EngineBuilt, read_manifest
from guardbake.check.difference import (
    Changed,
    Fact,
    Moved,
    changes,
    facts_of,
    flatten,
    movements,
)
from guardbake.errors import IntegrityError, MalformedError
from guardbake.spec import GuardSpec
from guardbake.steps.records import read_record

_FIGURES = ("attack_ratio", "harmless_rise", "sensor")


@dataclass(frozen=True)
class Difference:
    """guard: facts of the guards that differ. moved: their arrays that differ. bundle: what else
    differs where both are bundles: origins, tools, gates, behaviour."""

    guard: tuple[Changed, ...]
    moved: tuple[Moved, ...]
    bundle: tuple[Changed, ...]

    @property
    def same(self) -> bool:
        return not (self.guard or self.moved or self.bundle)

    def to_json(self) -> dict[str, Any]:
        """JSON values; a cosine or a length that is not a number is null."""
        moved = [asdict(each) for each in self.moved]
        for each in moved:
            for key in ("cosines", "lengths"):
                each[key] = [value if np.isfinite(value) else None for value in each[key]]
        return {
            "same": self.same,
            "guard": [asdict(each) for each in self.guard],
            "moved": moved,
            "bundle": [asdict(each) for each in self.bundle],
        }

    def lines(self) -> Iterator[str]:
        """For people, one difference a line."""
        for each in (*self.guard, *self.bundle):
            yield f"{_short(each.what)}: {_short(each.before)} -> {_short(each.after)}"
        for moved in self.moved:
            if moved.degrees is not None:
                angles = ", ".join(f"{angle:.2f}" for angle in moved.degrees)
                yield f"{moved.what}: principal angles {angles} degrees"
            else:
                pairs = zip(moved.cosines, moved.lengths, strict=True)
                columns = ", ".join(f"cosine {c:.6f} length x {n:.4f}" for c, n in pairs)
                yield f"{moved.what}: {columns}"


def diff(before: Path, after: Path) -> Difference:
    """Compare two guard packs or two folders that hold one; nothing is verified, only read.

    Raises MalformedError or IntegrityError if one of them cannot be read as what it claims to be.
    """
    one, two = _guard(before), _guard(after)
    papers = [_papers(path) for path in (before, after)]
    return Difference(
        tuple(changes(facts_of(one), facts_of(two))),
        tuple(movements(one, two)),
        tuple(changes(*papers)) if all(papers) else (),
    )


def require_same(difference: Difference, before: Path, after: Path) -> None:
    """Raises IntegrityError if there is a difference."""
    if not difference.same:
        first = next(difference.lines())
        raise IntegrityError(
            found=f"another guard or another bundle ({first})",
            expected=f"what {before} holds",
            where=str(after),
            remedy="review the difference, and take the new one as the one to compare with",
        )


def _guard(path: Path) -> GuardSpec:
    return load_guard(path / GUARD if path.is_dir() else path)


def _papers(path: Path) -> dict[str, Fact]:
    """Facts of manifest and certificate; none for a pack, or a folder without a manifest."""
    if not (path / MANIFEST).is_file():
        return {}
    manifest = read_manifest(path)
    origins = manifest.origins
    engine = origins.engine
    chain = {
        "samples": origins.samples,
        "graph": manifest.onnx,
        "engine": "built" if isinstance(engine, EngineBuilt) else engine.reason,
        "tool": origins.tools,
    }
    certificate = read_record(path / CERTIFICATE)
    try:
        return dict(flatten(chain)) | dict(_certified(certificate))
    except (AttributeError, KeyError, TypeError) as error:
        raise MalformedError(
            found=f"a certificate that lacks or mistypes {error}",
            expected="a certificate that guardbake bake wrote",
            where=str(path / CERTIFICATE),
            remedy="take the bundle from its source again",
        ) from error


def _certified(certificate: Mapping[str, Any]) -> Iterator[tuple[str, Fact]]:
    yield "verdict", certificate["verdict"]
    for gate in certificate["gates"]:
        yield f"gate {gate['name']}", gate["status"]
    behaviour = certificate["figures"]["behaviour"]
    for row in behaviour["table"]["rows"]:
        for judged in ("refused", "degenerate"):
            where = f"{row['arm']}, {row['label']} {row['family']}"
            yield f"{judged}, {where}", row[judged]["value"]
    for name in _FIGURES:
        yield from flatten(behaviour[name], name)


def _short(fact: Fact) -> str:
    if isinstance(fact, float):
        return f"{fact:.6g}"
    text = str(fact)
    if not text.isprintable():
        return ascii(text)
    return text[:12] if len(text) == 64 else text
