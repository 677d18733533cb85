"""A bundle around the tests' decoder: its guard, its papers, and two small graphs beside it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto, helper, numpy_helper

from guardbake.artifact import save_guard
from guardbake.bundle.files import describe
from guardbake.bundle.manifest import (
    CERTIFICATE,
    DECODER,
    GUARD,
    EngineNotBuilt,
    Origins,
    write_manifest,
)
from guardbake.bundle.papers import seal
from guardbake.spec import GuardSpec

from tests.certificates import small_certificate

_INFO = helper.make_tensor_value_info


@dataclass(frozen=True)
class Built:
    """What `guardbake build` left, and what it said on standard output and on standard error."""

    folder: Path
    output: str
    progress: str


def write_bundle(folder: Path, decoder: Path, spec: GuardSpec, engine: dict[str, Any]) -> Path:
    """engine: the recipe's engine section."""
    folder.mkdir()
    shutil.copyfile(decoder, folder / DECODER)
    shutil.copyfile(decoder.with_name(f"{DECODER}.data"), folder / f"{DECODER}.data")
    onnx.save_model(_vision(), folder / "vision.onnx")
    onnx.save_model(_embedding(), folder / "embedding.onnx")
    save_guard(spec, folder / GUARD)
    (folder / "recipe.json").write_text(json.dumps({"name": "small", "engine": engine}))
    mend(folder, spec)
    return folder


def mend(folder: Path, spec: GuardSpec) -> None:
    """Make certificate and manifest agree with whatever now stands in the folder."""
    graphs = {path.name: describe(folder, path.name).sha256 for path in folder.glob("*.onnx")}
    said = small_certificate(spec.model.digest, spec.digest, graphs)
    (folder / CERTIFICATE).write_text(json.dumps(said))
    origins = Origins(spec.model.digest, {}, spec.digest, EngineNotBuilt("a test builds it"))
    write_manifest(folder, seal(folder, origins))


def change_decoder(folder: Path, spec: GuardSpec, change: Callable[[ir.Model], object]) -> None:
    """Alter the bundle's decoder, and everything that would tell by its bytes."""
    model = ir.load(folder / DECODER)
    change(model)
    ir.save(model, folder / DECODER)
    mend(folder, spec)


def _vision() -> onnx.ModelProto:
    weight = numpy_helper.from_array(np.ones((48, 16), np.float32), "weight")
    shape = numpy_helper.from_array(np.array([-1, 48], np.int64), "shape")
    nodes = [
        helper.make_node("Reshape", ["pixel_values", "shape"], ["flat"], name="flat"),
        helper.make_node("MatMul", ["flat", "weight"], ["image_features"], name="project"),
    ]
    pixels = _INFO("pixel_values", TensorProto.FLOAT, ["images", 3, 4, 4])
    return _model(nodes, [pixels], ("image_features", ["images", 16]), [weight, shape])


def _embedding() -> onnx.ModelProto:
    table = numpy_helper.from_array(np.ones((32, 16), np.float32), "table")
    node = helper.make_node("Gather", ["table", "input_ids"], ["inputs_embeds"], name="look_up")
    ids = _INFO("input_ids", TensorProto.INT64, ["batch", "seq"])
    return _model([node], [ids], ("inputs_embeds", ["batch", "seq", 16]), [table])


def _model(
    nodes: list[onnx.NodeProto],
    inputs: list[onnx.ValueInfoProto],
    output: tuple[str, list[Any]],
    weights: list[onnx.TensorProto],
) -> onnx.ModelProto:
    result = _INFO(output[0], TensorProto.FLOAT, output[1])
    graph = helper.make_graph(nodes, "small", inputs, [result], weights)
    opset = [helper.make_opsetid("", 23)]
    return helper.make_model(graph, opset_imports=opset, ir_version=11)
