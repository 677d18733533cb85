"""The compiled engine: accepted for the GPUs named, with the guard proved inside, written whole."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import pytest

from guardbake.errors import (
    EnvironmentFault,
    IntegrityError,
    MalformedError,
    ResourceFault,
    SiteError,
    UnsupportedError,
    UsageError,
)

from guardbake_tensorrt import Backend, EngineProfile, EngineRecord, build_engine
from guardbake_tensorrt.build import write_atomically
from guardbake_tensorrt.compiler import build_failure


@pytest.fixture(scope="module")
def record(
    guarded: Any, backend: Backend, profile: EngineProfile, tmp_path_factory: Any
) -> tuple[EngineRecord, Path]:
    path = tmp_path_factory.mktemp("engine") / "decoder.engine"
    made = build_engine(
        guarded.path, path, backend=backend, profile=profile, guard_nodes=guarded.nodes
    )
    return made, path


def test_a_guarded_decoder_compiles_for_two_gpu_generations(
    record: tuple[EngineRecord, Path], guarded: Any, backend: Backend
) -> None:
    made, path = record
    assert made.status == "compiled"
    assert made.capabilities == ("SM89", "SM120")
    assert (made.backend, made.version) == ("rtx", backend.version)
    chosen = {"cache": "growing", "trunk": "float32"}
    assert dict(made.settings) == {"TF32": "False", "STRICT_NANS": "True"} | chosen
    assert [each.node for each in made.guard] == list(guarded.nodes)
    assert all(each.layers for each in made.guard)
    assert path.stat().st_size == made.engine_bytes
    assert hashlib.sha256(path.read_bytes()).hexdigest() == made.engine_sha256
    assert hashlib.sha256(guarded.path.read_bytes()).hexdigest() == made.onnx_sha256
    data = guarded.path.with_name("decoder.onnx.data")
    assert made.data_sha256 == ((data.name, hashlib.sha256(data.read_bytes()).hexdigest()),)


def test_the_record_survives_json(record: tuple[EngineRecord, Path]) -> None:
    made, _ = record
    assert EngineRecord.from_json(made.to_json()) == made
    with pytest.raises(MalformedError, match="compiled"):
        EngineRecord.from_json(made.to_json().replace('"compiled"', '"runs"'))
    with pytest.raises(MalformedError, match="compiled"):
        dataclasses.replace(made, status="runs")  # type: ignore[arg-type]
    with pytest.raises(MalformedError, match="no JSON"):
        EngineRecord.from_json(made.to_json()[:-9])
    with pytest.raises(MalformedError, match="keys"):
        EngineRecord.from_json("{}")
    with pytest.raises(MalformedError, match="past range"):
        EngineRecord.from_json(made.to_json().replace('"past": [\n      0', '"past": [\n      99'))


@pytest.mark.parametrize(
    ("gate", "edits"),
    [
        ("always", ("project", "care parallel")),
        ("token", ("astra", "add")),
        ("sequence", ("care sequential", "project")),
        ("pooling", ("care", "steer")),
        ("each", ("add", "steer")),
        ("sequence", ("replace", "replace")),
    ],
)
def test_every_gate_and_every_edit_compiles(
    gate: Any,
    edits: tuple[str, str],
    make_guarded: Any,
    backend: Backend,
    profile: EngineProfile,
    tmp_path: Path,
) -> None:
    guarded = make_guarded(gate, edits)
    made = build_engine(
        guarded.path,
        tmp_path / "e",
        backend=backend,
        capabilities=("SM89",),
        profile=profile,
        guard_nodes=guarded.nodes,
    )
    assert len(made.guard) == len(guarded.nodes)


@pytest.mark.usefixtures("record")
def test_the_sources_are_never_written(guarded: Any, plain: Path) -> None:
    onnx.checker.check_model(str(guarded.path))
    marked = [n for n in ir.load(guarded.path).graph if "TRT_decomposable" in n.attributes]
    assert marked == []
    assert {p.name for p in plain.parent.iterdir() if p.suffix == ".data"} == {"decoder.onnx.data"}


def test_a_guard_that_is_not_there_stops_the_build(
    plain: Path, guarded: Any, backend: Backend, profile: EngineProfile, tmp_path: Path
) -> None:
    out = tmp_path / "e"
    with pytest.raises(SiteError, match="0 nodes named") as caught:
        build_engine(plain, out, backend=backend, profile=profile, guard_nodes=guarded.nodes)
    assert caught.value.exit_code == 3
    assert not out.exists()


def test_capabilities_are_checked_before_anything_is_built(
    guarded: Any, backend: Backend, profile: EngineProfile, tmp_path: Path
) -> None:
    def build(*names: str) -> None:
        build_engine(
            guarded.path,
            tmp_path / "e",
            backend=backend,
            capabilities=names,
            profile=profile,
            guard_nodes=guarded.nodes,
        )

    with pytest.raises(UnsupportedError, match="H100 and H200"):
        build("SM89", "SM90")
    for wrong in (("SM89", "SM999"), ("CURRENT",), (), ("SM89", "SM89")):
        with pytest.raises(UsageError):
            build(*wrong)
    assert list(tmp_path.iterdir()) == []


def test_bfloat16_refuses_turing(backend: Backend, profile: EngineProfile, tmp_path: Path) -> None:
    info, kind = onnx.helper.make_tensor_value_info, onnx.TensorProto.BFLOAT16
    node = onnx.helper.make_node("Add", ["x", "x"], ["logits"], name="sum")
    graph = onnx.helper.make_graph(
        [node], "g", [info("x", kind, [2, 2])], [info("logits", kind, [2, 2])]
    )
    opset = [onnx.helper.make_opsetid("", 23)]
    path = tmp_path / "b.onnx"
    onnx.save_model(onnx.helper.make_model(graph, opset_imports=opset, ir_version=11), path)
    with pytest.raises(UnsupportedError, match="bfloat16"):
        build_engine(
            path,
            tmp_path / "e",
            backend=backend,
            capabilities=("SM75",),
            profile=profile,
            guard_nodes=(),
        )
    made = build_engine(
        path,
        tmp_path / "e",
        backend=backend,
        capabilities=("SM80",),
        profile=profile,
        guard_nodes=(),
    )
    assert made.engine_bytes > 0


def test_progress_is_reported_and_an_interrupt_leaves_nothing(
    guarded: Any, backend: Backend, profile: EngineProfile, tmp_path: Path
) -> None:
    seen: list[tuple[str, int, int]] = []

    def interrupt(phase: str, step: int, steps: int) -> None:
        seen.append((phase, step, steps))
        if len(seen) > 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_engine(
            guarded.path,
            tmp_path / "e",
            backend=backend,
            profile=profile,
            guard_nodes=guarded.nodes,
            progress=interrupt,
        )
    assert all(0 < step <= steps for _, step, steps in seen)
    assert list(tmp_path.iterdir()) == []


def test_broken_inputs_name_what_is_broken(
    guarded: Any, backend: Backend, profile: EngineProfile, tmp_path: Path
) -> None:
    def build(path: Path) -> None:
        build_engine(
            path, tmp_path / "e", backend=backend, profile=profile, guard_nodes=guarded.nodes
        )

    whole, data = guarded.path.read_bytes(), guarded.path.with_name("decoder.onnx.data")
    with pytest.raises(UsageError, match="no such file"):
        build(tmp_path / "none.onnx")
    for content in (b"", whole[: len(whole) // 2], b"# no model"):
        broken = tmp_path / "broken.onnx"
        broken.write_bytes(content)
        with pytest.raises(MalformedError):
            build(broken)
    copy = tmp_path / "copy.onnx"
    copy.write_bytes(whole)
    with pytest.raises(IntegrityError, match="no file"):
        build(copy)
    copy.with_name(data.name).write_bytes(data.read_bytes()[:-1])
    with pytest.raises(IntegrityError, match="at least"):
        build(copy)


def test_an_engine_appears_complete_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "out" / "e"
    digest = write_atomically(path, memoryview(b"first"))
    assert digest == hashlib.sha256(b"first").hexdigest()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ResourceFault, match="No space"):
        write_atomically(path, memoryview(b"second"))
    assert path.read_bytes() == b"first"
    assert [each.name for each in path.parent.iterdir()] == ["e"]


@pytest.mark.parametrize(
    ("reason", "kind"),
    [
        ("Cuda Runtime (CUDA driver version is insufficient)", EnvironmentFault),
        ("std::bad_alloc", ResourceFault),
        ("Attention operation was not supported by a dedicated kernel", UnsupportedError),
    ],
)
def test_a_builder_that_gives_up_is_told_apart(reason: str, kind: type[Exception]) -> None:
    error = build_failure(reason, Path("decoder.onnx"))
    assert type(error) is kind
    assert reason in error.found
