"""Decoders to be compiled, and guards in them.

`plain` is of two layers and width 16, as the exporters write it; `tiny` is exported from the tiny
checkpoints, a LLaVA and a Qwen2.5-VL of six layers and width 128.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from guardbake.passes.insert import InsertGuard
from guardbake.site import Site
from guardbake.spec import GuardSpec, Profile
from guardbake.vlm.catalog import family_of, models_root
from guardbake.vlm.hollow import hollow_model
from guardbake.vlm.tensors import parameters_in

from guardbake_onnx.capture import capture_decoder
from guardbake_onnx.weights import stream
from guardbake_onnx.write import write_graph
from guardbake_tensorrt import Backend, EngineProfile, load_backend
from tests.bakes import guardbake
from tests.onnx.conftest import exported as exported  # a fixture, as is the next
from tests.onnx.conftest import mixed_batch as mixed_batch
from tests.tensorrt.bundles import Built, write_bundle

WIDTH, HEADS, HEAD, LAYERS, WORDS = 16, 2, 8, 2, 32
EXTERNAL_FROM = 512  # bytes; the guard's own arrays are smaller and stay in the file


@dataclass(frozen=True)
class Guarded:
    """A guarded decoder on disk, the names of its guard nodes, and the guard."""

    path: Path
    nodes: tuple[str, ...]
    spec: GuardSpec


class _Decoder:
    def __init__(self) -> None:
        self.rng = np.random.default_rng(0)
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []

    def op(self, op_type: str, inputs: list[str], output: str, **attributes: Any) -> str:
        name = output.removesuffix("/output_0")
        self.nodes.append(helper.make_node(op_type, inputs, [output], name=name, **attributes))
        return output

    def array(self, name: str, array: np.ndarray) -> str:
        self.weights.append(numpy_helper.from_array(array, name))
        return name

    def linear(self, x: str, name: str, inner: int, outer: int) -> str:
        weight = self.rng.standard_normal((inner, outer)) / np.sqrt(inner)
        self.array(f"{name}/weight", weight.astype(np.float32))
        return self.op("MatMul", [x, f"{name}/weight"], f"{name}/MatMul/output_0")

    def norm(self, x: str, name: str) -> str:
        self.array(f"{name}/weight", np.ones(WIDTH, np.float32))
        return self.op("RMSNormalization", [x, f"{name}/weight"], f"{name}/output_0", axis=-1)

    def heads(self, x: str, name: str) -> str:
        """As torch exports it: sizes from the input, the number of heads left as -1."""
        shape = self.op("Concat", ["batch_seq", "minus_one", "head"], f"{name}/shape", axis=0)
        split = self.op("Reshape", [x, shape], f"{name}/split")
        return self.op("Transpose", [split], f"{name}/heads", perm=[0, 2, 1, 3])

    def layer(self, x: str, index: int) -> str:
        base = f"/model/layers.{index}"
        normed = self.norm(x, f"{base}/input_norm")
        q, k, v = (
            self.heads(self.linear(normed, f"{base}/{each}", WIDTH, WIDTH), f"{base}/{each}")
            for each in "qkv"
        )
        for each, name in ((k, "key"), (v, "value")):
            past = f"past_key_values.{index}.{name}"
            self.op("Concat", [past, each], f"present.{index}.{name}", axis=2)
        keys_values = [f"present.{index}.{name}" for name in ("key", "value")]
        a = self.op("Attention", [q, *keys_values, "mask"], f"{base}/attention/output_0")
        a = self.op("Transpose", [a], f"{base}/back", perm=[0, 2, 1, 3])
        a = self.op("Reshape", [a, "joined"], f"{base}/joined")
        x = self.op("Add", [x, self.linear(a, f"{base}/o", WIDTH, WIDTH)], f"{base}/middle")
        up = self.linear(self.norm(x, f"{base}/post_norm"), f"{base}/mlp/up_proj", WIDTH, 32)
        up = self.op("Sigmoid", [up], f"{base}/mlp/act/output_0")
        down = self.linear(up, f"{base}/mlp/down_proj", 32, WIDTH)
        return self.op("Add", [x, down], f"{base}/residual/output_0")

    def model(self) -> onnx.ModelProto:
        self.array("minus_one", np.array([-1], np.int64))
        self.array("head", np.array([HEAD], np.int64))
        self.array("joined", np.array([0, 0, WIDTH], np.int64))
        self.array("axes", np.array([1, 2], np.int64))
        self.array("one", np.array([1], np.int64))
        self.array("rows", np.array([0, 3, 1, 2], np.int64))
        self.op("Shape", ["inputs_embeds"], "batch_seq", start=0, end=2)
        self.op("Cast", ["attention_mask"], "mask_bool", to=TensorProto.BOOL)
        self.op("Unsqueeze", ["mask_bool", "axes"], "mask_row")
        self.op("Shape", ["attention_mask"], "total", start=1, end=2)
        sizes = self.op("Concat", ["batch_seq", "total", "one"], "mask_sizes", axis=0)
        self.op("Expand", ["mask_row", self.op("Gather", [sizes, "rows"], "mask_shape")], "mask")
        x = "inputs_embeds"
        for index in range(LAYERS):
            x = self.layer(x, index)
        self.linear(self.norm(x, "/model/norm"), "/lm_head", WIDTH, WORDS)
        self.op("Identity", ["/lm_head/MatMul/output_0"], "logits")
        return helper.make_model(
            helper.make_graph(self.nodes, "decoder", _inputs(), _outputs(), self.weights),
            opset_imports=[helper.make_opsetid("", 23)],
            ir_version=11,
        )


def _inputs() -> list[onnx.ValueInfoProto]:
    info, floats, ints = helper.make_tensor_value_info, TensorProto.FLOAT, TensorProto.INT64
    return [
        info("inputs_embeds", floats, ["batch", "seq", WIDTH]),
        info("attention_mask", ints, ["batch", "total"]),
        *(
            info(f"past_key_values.{i}.{name}", floats, ["batch", HEADS, "past", HEAD])
            for i in range(LAYERS)
            for name in ("key", "value")
        ),
    ]


def _outputs() -> list[onnx.ValueInfoProto]:
    info, floats = helper.make_tensor_value_info, TensorProto.FLOAT
    return [
        info("logits", floats, ["batch", "seq", WORDS]),
        *(
            info(f"present.{i}.{name}", floats, ["batch", HEADS, "total", HEAD])
            for i in range(LAYERS)
            for name in ("key", "value")
        ),
    ]


@pytest.fixture(scope="session")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unguarded decoder, its weights in decoder.onnx.data."""
    path = tmp_path_factory.mktemp("plain") / "decoder.onnx"
    model = onnx.shape_inference.infer_shapes(_Decoder().model())
    onnx.checker.check_model(model, full_check=True)
    onnx.save_model(
        model,
        path,
        save_as_external_data=True,
        location=f"{path.name}.data",
        size_threshold=EXTERNAL_FROM,
    )
    return path


@dataclass(frozen=True)
class Tiny:
    """An exported decoder without a guard, its weights in decoder.onnx.data."""

    path: Path
    width: int
    layers: int
    mrope: bool


def _exported(checkpoint: Path) -> ir.Model:
    model = hollow_model(checkpoint)
    graph = capture_decoder(model, family_of(model.config))
    stream(graph, parameters_in(checkpoint, model))
    return graph


@pytest.fixture(scope="session", params=["tiny-llava", "tiny-qwen2_5_vl"])
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    torch.set_num_threads(1)
    path = tmp_path_factory.mktemp(request.param) / "decoder.onnx"
    write_graph(_exported(models_root() / request.param), path)
    return Tiny(path, 128, 6, "qwen" in request.param)


MakeGuarded = Callable[[Profile, tuple[str, str]], Guarded]


@pytest.fixture(scope="session")
def make_guarded(plain: Path, guard: Callable[..., GuardSpec]) -> MakeGuarded:
    """(gate, edits of both layers) -> the guarded decoder, beside the plain one.

    pooling: sequence, its sensor averages. each: sequence, a gate for either layer.
    """

    def make(gate: Profile | Literal["pooling", "each"], kinds: tuple[str, str]) -> Guarded:
        one, other = (
            guard(
                "sequence" if gate in ("pooling", "each") else gate,
                kind,
                width=WIDTH,
                layers=LAYERS,
                sensor=Site(0, "ffn_output"),
                edits=(0, 1),
                gains=kind != "replace",
                pools=gate == "pooling",
                later=(Site(0, "residual"),) if gate == "each" else (),
            )
            for kind in kinds
        )
        model = ir.load(plain)
        spec = replace(one, edits=(one.edits[0], other.edits[1]))
        report = InsertGuard(spec)(model)
        path = plain.with_name(f"{gate}_{'_'.join(kinds)}.onnx".replace(" ", "_"))
        ir.save(model, path)
        return Guarded(path, report.nodes, spec)

    return make


@pytest.fixture(scope="session")
def guarded(make_guarded: MakeGuarded) -> Guarded:
    """The demo's shape of guard: a sequence gate and two edits."""
    return make_guarded("sequence", ("care", "steer"))


@pytest.fixture(scope="session")
def backend() -> Backend:
    return load_backend("rtx")


@pytest.fixture(scope="session")
def profile() -> EngineProfile:
    return EngineProfile(batch=(1, 1, 2), seq=(1, 8, 16), past=(0, 8, 32))


@pytest.fixture(scope="session")
def bundle(guarded: Guarded, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle without engines; its recipe says for which GPU and which sizes they are to be."""
    sizes = {"sequence": [1, 4, 8], "past": [0, 4, 16]}
    section = {"backend": "rtx", "capabilities": ["ada"], **sizes}
    folder = tmp_path_factory.mktemp("bundle") / "bundle"
    return write_bundle(folder, guarded.path, guarded.spec, section)


@pytest.fixture
def altered(bundle: Path, tmp_path: Path) -> Path:
    """A copy of the bundle, to be altered."""
    return Path(shutil.copytree(bundle, tmp_path / "bundle"))


@pytest.fixture(scope="session")
def built(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Built:
    """Engines of all graphs of the bundle."""
    out = tmp_path_factory.mktemp("engines") / "engines"
    command = ("build", bundle, "-o", out, "--backend", "tensorrt-rtx", "--progress", "json")
    done = guardbake(*command)
    assert done.returncode == 0, done.stderr
    return Built(out, done.stdout, done.stderr)
