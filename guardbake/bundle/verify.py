"""Verify a bundle without running a model: its bytes, and that its graph carries its guard.

The manifest tells damage; reading the graph against the guard pack tells also what somebody altered
together with the manifest. Everything amiss inside a bundle is an IntegrityError.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import onnx_ir as ir

from guardbake.artifact import load_guard
from guardbake.bundle.canonical import parse
from guardbake.bundle.data import check_external_data
from guardbake.bundle.engine import check_engines
from guardbake.bundle.graphs import ALTERED, load_graph
from guardbake.bundle.manifest import (
    CERTIFICATE,
    DECODER,
    GUARD,
    RECIPE,
    EngineBuilt,
    Manifest,
    check_files,
    read_manifest,
)
from guardbake.bundle.papers import check_papers
from guardbake.check.junit import Suite
from guardbake.check.record import read_certificate
from guardbake.errors import IntegrityError, MalformedError, SiteError, UsageError
from guardbake.passes.verify import VerifyGuard
from guardbake.spec import GuardSpec

_REMEDY = "do not ship this bundle: bake it again, or take it from its source"


@dataclass(frozen=True)
class VerifyReport:
    """What was found in order.

    files: how many the bundle has, rehashed: how many of them were read again, size: bytes of all.
    guard: the guard's digest. nodes: its call nodes in the decoder, by name. engine: whether the
    bundle records one; nothing here runs it.
    """

    files: int
    rehashed: int
    size: int
    guard: str
    nodes: tuple[str, ...]
    engine: bool


class Bundle:
    """A bundle that is being verified: what one check has read, the next one need not."""

    def __init__(self, folder: Path, full: bool = False) -> None:
        self.folder = folder
        self.full = full
        self.rehashed = 0
        self.nodes: tuple[str, ...] = ()

    @cached_property
    def manifest(self) -> Manifest:
        return read_manifest(self.folder)

    @cached_property
    def spec(self) -> GuardSpec:
        return load_guard(self.folder / GUARD)


def verify_bundle(folder: Path, full: bool = False, suite: Suite | None = None) -> VerifyReport:
    """Check manifest, files, guard pack, graphs, engines and certificate against each other.

    full: read every file again; otherwise files of 64 MB and more are compared by size alone.
    suite: is told of each check; those behind the first that refuses are skipped.
    Raises UsageError if there is no such folder, IntegrityError at the first thing amiss in it.
    """
    if not folder.is_dir():
        raise UsageError(
            found="no folder",
            expected="a bundle that guardbake bake wrote",
            where=str(folder),
            remedy="name the folder that was given to bake as -o",
        )
    bundle = Bundle(folder, full)
    _run_all(bundle, suite or Suite("verify"))
    return VerifyReport(
        files=len(bundle.manifest.files),
        rehashed=bundle.rehashed,
        size=sum(entry.size for entry in bundle.manifest.files),
        guard=bundle.spec.digest,
        nodes=bundle.nodes,
        engine=isinstance(bundle.manifest.origins.engine, EngineBuilt),
    )


def _run_all(bundle: Bundle, suite: Suite) -> None:
    names = list(CHECKS)
    for place, name in enumerate(names):
        try:
            run_check(name, bundle)
        except IntegrityError as error:
            suite.check(name, "failure", str(error))
            for later in names[place + 1 :]:
                suite.check(later, "skipped", f"{name} failed")
            raise
        suite.check(name, "", "as the manifest and the guard pack say")


def run_check(name: str, bundle: Bundle) -> None:
    """One of CHECKS, those before it having passed; raises IntegrityError at what is amiss."""
    try:
        CHECKS[name](bundle)
    except MalformedError as error:
        raise IntegrityError(
            found=error.found, expected=error.expected, where=error.where, remedy=_REMEDY
        ) from error


def _check_bytes(bundle: Bundle) -> None:
    bundle.rehashed = check_files(bundle.folder, bundle.manifest, bundle.full)
    _require_listed(bundle.folder, bundle.manifest)


def _check_pack(bundle: Bundle) -> None:
    """The guard pack is whole, and is of the guard and the model that the manifest states."""
    spec, origins, path = bundle.spec, bundle.manifest.origins, bundle.folder / GUARD
    if spec.digest != origins.guard:
        _amiss(
            f"guard {spec.digest[:12]}",
            f"guard {origins.guard[:12]}, which the manifest states",
            path,
        )
    if spec.model.digest != origins.model:
        _amiss(
            f"a guard for model {spec.model.digest[:12]}",
            f"one for model {origins.model[:12]}, from which the bundle was made",
            path,
        )


def _check_papers(bundle: Bundle) -> None:
    check_papers(bundle.folder, bundle.manifest)


def _check_data(bundle: Bundle) -> None:
    """Every graph can be read, and its external data lies whole beside it."""
    for name in bundle.manifest.onnx:
        check_external_data(bundled_graph(bundle.folder / name), bundle.folder / name)


def _check_presence(bundle: Bundle) -> None:
    bundle.nodes = _check_decoder(bundle.folder / DECODER, bundle.spec)


def _check_engine(bundle: Bundle) -> None:
    check_engines(bundle.folder, bundle.manifest, bundle.nodes)


def _require_listed(folder: Path, manifest: Manifest) -> None:
    names = {entry.name for entry in manifest.files}
    for name in (DECODER, GUARD, RECIPE):
        if name not in names:
            _amiss(f"no {name}", f"a bundle with {name}", folder)


def _check_certificate(bundle: Bundle) -> None:
    """The certificate says pass, as its gates do, and is of this guard and these graphs."""
    path, manifest = bundle.folder / CERTIFICATE, bundle.manifest
    value: Any = parse(path.read_bytes(), str(path), _REMEDY)
    said = read_certificate(value, str(path))
    if said.verdict != "pass":
        _amiss(f"verdict {said.verdict}", 'verdict "pass"', path)
    for key, found, wanted in (
        ("model", said.digests.model, manifest.origins.model),
        ("guard", said.digests.guard, manifest.origins.guard),
        ("onnx", said.digests.onnx, manifest.onnx),
    ):
        if found != wanted:
            _amiss(
                f"a certificate of {key} {json.dumps(found):.120}",
                f"one of {json.dumps(wanted):.120}",
                path,
            )


def _check_decoder(path: Path, spec: GuardSpec) -> tuple[str, ...]:
    model = bundled_graph(path)
    try:
        return VerifyGuard(spec, str(path))(model).nodes
    except (SiteError, *ALTERED) as error:
        _amiss(f"a graph that cannot be read as guarded ({error})", "the guard's own graph", path)


CHECKS: Mapping[str, Callable[[Bundle], None]] = {
    "bytes": _check_bytes,
    "pack": _check_pack,
    "certificate": _check_certificate,
    "papers": _check_papers,
    "data": _check_data,
    "presence": _check_presence,
    "engine": _check_engine,
}
"""What is verified, in order: each check relies on those before it."""


def bundled_graph(path: Path) -> ir.Model:
    """A bundle's graph without its external data; raises IntegrityError if it is not one."""
    try:
        return load_graph(path)
    except MalformedError as error:
        raise IntegrityError(
            found=error.found, expected=error.expected, where=error.where, remedy=_REMEDY
        ) from error


def _amiss(found: str, expected: str, where: Path) -> NoReturn:
    raise IntegrityError(found=found, expected=expected, where=str(where), remedy=_REMEDY)
