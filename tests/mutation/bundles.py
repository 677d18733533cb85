"""What planting needs of a bundle: its graph, its pack, its weights and its papers, to rewrite."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from safetensors.numpy import load, save

from guardbake.artifact import load_guard
from guardbake.bundle.files import describe
from guardbake.bundle.manifest import (
    CERTIFICATE,
    DECODER,
    GUARD,
    read_manifest,
    write_manifest,
)
from guardbake.bundle.papers import seal

Plant = Callable[[Path], None]
DATA = f"{DECODER}.data"
RECORD = "decoder.engine.json"


def rewrite_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content, sort_keys=True))


def mend(bundle: Path, guard: str | None = None, record: bool = True) -> None:
    """Make engine record, certificate and manifest agree with whatever now stands in the bundle.

    guard: state another guard than before. record: whether the engine's record is mended, too.
    """
    origins = read_manifest(bundle).origins
    if guard is not None:
        origins = replace(origins, guard=guard)
    decoder = describe(bundle, DECODER).sha256
    if record:
        data = [[DATA, describe(bundle, DATA).sha256]]
        stated = {"onnx_sha256": decoder, "data_sha256": data, "guard_digest": origins.guard}
        rewrite_json(bundle / RECORD, lambda r: r.update(stated))
    onnx = {path.name: describe(bundle, path.name).sha256 for path in bundle.glob("*.onnx")}
    digests = {"guard": origins.guard, "onnx": onnx}
    rewrite_json(bundle / CERTIFICATE, lambda c: c["digests"].update(digests))
    write_manifest(bundle, seal(bundle, origins))


@contextmanager
def graph_of(bundle: Path) -> Iterator[ir.Model]:
    """The decoder's graph; afterwards it is written back and everything is mended."""
    model = ir.load(bundle / DECODER)
    yield model
    ir.save(model, bundle / DECODER)
    mend(bundle)


def in_graph(change: Callable[[ir.Model], None]) -> Plant:
    def plant(bundle: Path) -> None:
        with graph_of(bundle) as model:
            change(model)

    return plant


def rewrite_pack(
    bundle: Path,
    change: Callable[[dict[str, Any], dict[str, np.ndarray]], object],
) -> None:
    """Change header and arrays of the guard pack under the digest it states; mend the manifest."""
    path = bundle / GUARD
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    meta = json.loads(data[8 : 8 + length])["__metadata__"]
    head, arrays = json.loads(meta["guardbake"]), {k: v.copy() for k, v in load(data).items()}
    change(head, arrays)
    meta["guardbake"] = json.dumps(head, sort_keys=True, separators=(",", ":"))
    path.write_bytes(save(arrays, meta))
    mend(bundle)


def in_pack(change: Callable[[dict[str, Any], dict[str, np.ndarray]], object]) -> Plant:
    return lambda bundle: rewrite_pack(bundle, change)


def edited_layers(bundle: Path) -> list[int]:
    return [edit.site.layer for edit in load_guard(bundle / GUARD).edits]


def rotation(rank: int) -> np.ndarray:
    """[k, k] float64 orthogonal, the same every time, and no permutation."""
    return np.linalg.qr(np.random.default_rng(3).standard_normal((rank, rank)))[0]


def turned_inside(basis: np.ndarray) -> np.ndarray:
    """Another orthonormal basis of the same subspace."""
    return (basis.astype(np.float64) @ rotation(basis.shape[1])).astype(np.float32)


def turned_outside(basis: np.ndarray) -> np.ndarray:
    """An orthonormal basis of a subspace ten degrees away."""
    rng, exact = np.random.default_rng(4), basis.astype(np.float64)
    other = rng.standard_normal(exact.shape)
    other -= exact @ (exact.T @ other)
    away = np.linalg.qr(other)[0]
    angle = np.radians(10)
    turned = np.cos(angle) * exact + np.sin(angle) * away
    return np.linalg.qr(turned)[0].astype(np.float32)
