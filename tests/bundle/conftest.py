"""A small bundle to damage, and a way to run guardbake in another process."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from guardbake.artifact import save_guard
from guardbake.bundle.manifest import EngineNotBuilt, Origins
from guardbake.passes.insert import InsertGuard
from guardbake.site import Site
from guardbake.spec import GuardSpec

from tests.certificates import small_certificate

WIDTH, LAYERS, VOCABULARY = 16, 3, 24


def decoder_graph() -> ir.Model:
    """Three residual layers of one matrix each, under the names of our exporter."""
    rng = np.random.default_rng(7)
    nodes: list[ir.Node] = []
    weights: list[ir.Value] = []

    def matmul(x: ir.Value, name: str, columns: int) -> ir.Value:
        array = rng.standard_normal((WIDTH, columns)).astype(np.float32)
        weights.append(
            ir.val(f"{name}.weight", const_value=ir.tensor(array, name=f"{name}.weight"))
        )
        return node("MatMul", [x, weights[-1]], name, columns)

    def node(op: str, inputs: list[ir.Value], name: str, columns: int) -> ir.Value:
        made = ir.node(op, inputs, name=name)
        made.outputs[0].name = name
        made.outputs[0].dtype = ir.DataType.FLOAT
        made.outputs[0].shape = ir.Shape(["batch", "sequence", columns])
        nodes.append(made)
        return made.outputs[0]

    x = ir.val("inputs_embeds", ir.DataType.FLOAT, ["batch", "sequence", WIDTH])
    mask = ir.val("attention_mask", ir.DataType.INT64, ["batch", "total"])
    inputs = [x, mask]
    for layer in range(LAYERS):
        y = matmul(x, Site(layer, "ffn_output").onnx_value, WIDTH)
        x = node("Add", [x, y], f"/model/layers.{layer}/residual", WIDTH)
    logits = matmul(x, "logits", VOCABULARY)
    graph = ir.Graph(
        inputs, [logits], nodes=nodes, initializers=weights, opset_imports={"": 23}, name="decoder"
    )
    return ir.Model(graph, ir_version=10)


@pytest.fixture(scope="session")
def spec(guard: Callable[..., GuardSpec]) -> GuardSpec:
    """A guard for `decoder_graph`."""
    return guard("sequence", "care", width=WIDTH, layers=LAYERS)


@pytest.fixture(scope="session")
def origins(spec: GuardSpec) -> Origins:
    return Origins(
        model=spec.model.digest,
        samples={"fit": "1" * 64, "test": "2" * 64},
        guard=spec.digest,
        engine=EngineNotBuilt("the recipe asks for none"),
        tools={"guardbake": "0.1.0", "numpy": np.__version__},
    )


def write_certificate(folder: Path, model: str, guard: str) -> None:
    onnx = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.onnx")
    }
    content = small_certificate(model, guard, onnx)
    (folder / "certificate.json").write_text(json.dumps(content, sort_keys=True))


@pytest.fixture
def sources(tmp_path: Path, spec: GuardSpec) -> dict[str, Path]:
    """The files of a sound bundle: guarded decoder, its weights, a vision graph, pack, paper."""
    folder = tmp_path / "sources"
    folder.mkdir()
    for name in ("decoder", "vision"):
        path = folder / f"{name}.onnx"
        ir.save(decoder_graph(), path, external_data=f"{name}.onnx.data", size_threshold_bytes=512)
    model = ir.load(folder / "decoder.onnx")
    InsertGuard(spec)(model)
    ir.save(model, folder / "decoder.onnx")
    save_guard(spec, folder / "guard.safetensors")
    write_certificate(folder, spec.model.digest, spec.digest)
    (folder / "recipe.json").write_text('{"name": "small"}')
    return {path.name: path for path in sorted(folder.iterdir())}


Spawn = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def spawn() -> Spawn:
    """Start `python -c script arguments...` with this process's import path; text output piped."""

    def start(script: str, *arguments: object) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", script, *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )

    return start


def leftovers(folder: Path) -> list[str]:
    """Hidden names in `folder`: what an atomic writer must not leave."""
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


@pytest.fixture(name="leftovers")
def leftovers_fixture() -> Callable[[Path], list[str]]:
    return leftovers


@pytest.fixture
def certify() -> Callable[..., None]:
    """`write_certificate`: say of the graphs in a folder what a passing bake would."""
    return write_certificate
