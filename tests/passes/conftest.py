"""A toy decoder: per layer one FFN (one matrix) and the residual add, as a graph and as numpy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from guardbake import semantics as law
from guardbake.passes.insert import InsertGuard
from guardbake.site import Site
from guardbake.spec import GuardSpec

Array = npt.NDArray[np.floating]
WIDTH, LAYERS = 16, 3
# Three layers of 16 products each on values up to about 10, in two orders of summation:
# 3 * 16 * 10 * 2**-24 = 3e-5 at worst.
FP32 = 3e-5
DTYPES = {ir.DataType.FLOAT: np.float32, ir.DataType.FLOAT16: np.float16}


def our_name(layer: int) -> str:
    return f"/model/layers.{layer}/mlp/down_proj/MatMul"


@dataclass
class Toy:
    """model: the graph; weights: one [d, d] a layer, float32; biases: one [d] or None a layer."""

    model: ir.Model
    weights: list[Array]
    biases: list[Array | None]

    def node(self, name: str) -> ir.Node:
        return next(node for node in self.model.graph if node.name == name)

    def value(self, layer: int) -> ir.Value:
        return self.node(our_name(layer)).outputs[0]

    def law(self, spec: GuardSpec, feeds: dict[str, Array]) -> dict[str, Array]:
        """What the guarded decoder computes, by `semantics`."""
        hidden, out = feeds["inputs_embeds"], {}
        seen: dict[Site, Array] = {}
        gates = _Gates(spec, feeds)
        for layer, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            y = hidden @ weight + (0 if bias is None else bias)
            seen[Site(layer, "ffn_output")] = y
            gates.sense(seen)
            for edit in spec.edits:
                if edit.site.layer == layer:
                    text = feeds.get(f"guard_text_{layer}")
                    if edit.kind == "replace":
                        z = law.coordinates(y, edit.branches[0])
                        out[f"guard_heard_{layer}"] = _at_last_real(z, feeds["attention_mask"])
                    edited = law.edited(y, edit, text)
                    y = law.gated(y, edited, gates.opens[edit.gate]) if spec.sensors else edited
            hidden = hidden + y
            seen[Site(layer, "residual")] = hidden
            gates.sense(seen)
        return {"logits": hidden, **out, **gates.out}


class _Gates:
    """The guard's gates on their way through one call: what they say in `out`, and `opens`."""

    def __init__(self, spec: GuardSpec, feeds: dict[str, Array]) -> None:
        self.spec = spec
        self.feeds = feeds
        self.opens: list[Array] = []
        self.out: dict[str, Array] = {}
        self._states: list[Array] = []

    def sense(self, seen: dict[Site, Array]) -> None:
        """Every gate decides as soon as its sensor's last site was seen."""
        for gate, sensor in enumerate(self.spec.sensors):
            if gate == len(self.opens) and sensor.sites[-1] in seen:
                self._decide(gate, law.features([seen[s] for s in sensor.sites], sensor.readings))

    def _decide(self, gate: int, features: Array) -> None:
        sensor, mask = self.spec.sensors[gate], self.feeds["attention_mask"]
        memory = self.feeds["guard_memory"] if self.spec.pools else None
        number = f"_{gate}" if len(self.spec.sensors) > 1 else ""
        if sensor.pools:
            score, self.out["guard_memory_out"] = law.pooled_score(
                features, sensor.thresholds, mask, self.feeds["guard_image_mask"], memory
            )
        else:
            score = law.score(features, sensor.thresholds)
        if self.spec.profile == "token":
            opened = law.gate_by_token(score, mask)
        else:
            own = law.own_state(self.feeds["guard_state"], gate)
            opened, after = law.gate_by_sequence(score, mask, own, memory)
            self._states.append(after)
            self.out["guard_state_out"] = law.joint_state(self._states)
        self.opens.append(opened)
        self.out |= {f"guard_score{number}": score, f"guard_open{number}": opened}


def _at_last_real(z: Array, mask: Array) -> Array:
    """z [B, S, k] at each row's last real token of this call; zeros where there is none."""
    out = np.zeros_like(z[:, 0])
    for row, real in enumerate(mask[:, -z.shape[1] :]):
        if real.any():
            out[row] = z[row, np.flatnonzero(real)[-1]]
    return out


def build_toy(
    name: Callable[[int], str] = our_name,
    dtype: ir.DataType = ir.DataType.FLOAT,
    *,
    bias: bool = False,
    scopes: bool = False,
    mask: bool = True,
    opset: int = 23,
    scale: float = 0.25,
) -> Toy:
    """logits is the last residual. name: the FFN's node; "{name}/output_0" is its output."""
    rng, numpy_dtype = np.random.default_rng(7), DTYPES[dtype]
    shape = ["batch", "sequence", WIDTH]
    hidden = ir.val("inputs_embeds", dtype, shape)
    inputs = [hidden]
    if mask:
        inputs.append(ir.val("attention_mask", ir.DataType.INT64, ["batch", "total"]))
    nodes: list[ir.Node] = []
    initializers: list[ir.Value] = []
    weights: list[Array] = []
    biases: list[Array | None] = []

    def constant(value: str, array: Array) -> ir.Value:
        tensor = ir.tensor(array.astype(numpy_dtype), name=value)
        initializers.append(ir.val(value, const_value=tensor))
        return initializers[-1]

    def step(op: str, operands: Sequence[ir.Value], called: str) -> ir.Value:
        node = ir.node(op, operands, name=called)
        node.outputs[0].name = f"{called}/output_0"
        node.outputs[0].dtype, node.outputs[0].shape = dtype, ir.Shape(shape)
        nodes.append(node)
        return node.outputs[0]

    for layer in range(LAYERS):
        weights.append((rng.standard_normal((WIDTH, WIDTH)) * scale).astype(numpy_dtype))
        y = step("MatMul", [hidden, constant(f"w{layer}", weights[-1])], name(layer))
        biases.append(rng.standard_normal(WIDTH).astype(numpy_dtype) if bias else None)
        if bias:
            sums = name(layer).replace("MatMul", "Add")
            y = step("Add", [constant(f"b{layer}", biases[-1]), y], sums)
        if scopes:
            text = f"['', 'model.layers.{layer}', 'model.layers.{layer}.mlp', 'x']"
            nodes[-1].metadata_props["pkg.torch.onnx.name_scopes"] = text
        hidden = step("Add", [hidden, y], f"residual_{layer}")
    logits = step("Identity", [hidden], "head")
    logits.name = "logits"
    graph = ir.Graph(
        inputs, [logits], nodes=nodes, initializers=initializers, opset_imports={"": opset},
        name="toy",
    )  # fmt: skip
    return Toy(ir.Model(graph, ir_version=11), weights, biases)


def run_graph(model: ir.Model, feeds: dict[str, Array]) -> dict[str, Array]:
    """One call in onnxruntime, of a copy that went through the file format and the checker."""
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    wanted = {value.name for value in session.get_inputs()}
    names = [value.name for value in session.get_outputs()]
    values = session.run(None, {key: feeds[key] for key in sorted(wanted)})
    return dict(zip(names, values, strict=True))


def make_feeds(
    batch: int = 4, tokens: int = 5, dtype: type[np.floating] = np.float32, seed: int = 0
) -> dict[str, Array]:
    """Left padding, right padding, a state of each code of one gate."""
    rng = np.random.default_rng(seed)
    mask = np.ones((batch, tokens), np.int64)
    mask[1, :2] = 0
    mask[2, 3:] = 0
    return {
        "inputs_embeds": rng.standard_normal((batch, tokens, WIDTH)).astype(dtype),
        "attention_mask": mask,
        "guard_state": np.resize([0, -2, -2, law.OPEN, law.CLOSED], batch).astype(np.int64),
        "guard_image_mask": rng.random((batch, tokens)) < 0.4,
        "guard_memory": np.zeros((batch, 3), np.float32),
    }


def feeds_for(lab: Any, spec: GuardSpec, **shape: Any) -> dict[str, Any]:
    feeds = dict(lab.feeds(**shape))
    if spec.profile != "sequence":
        del feeds["guard_state"]
    if not spec.pools:
        del feeds["guard_memory"], feeds["guard_image_mask"]
    return feeds


def agree(got: dict[str, Any], expected: dict[str, Any]) -> None:
    assert sorted(got) == sorted(expected)
    for name, array in expected.items():
        assert np.abs(got[name].astype(np.float64) - array).max() < FP32, name


def reloaded(model: ir.Model) -> ir.Model:
    """The model as a file would give it back."""
    return ir.from_proto(ir.to_proto(model))


def insert(toy: Toy, spec: GuardSpec) -> ir.Model:
    InsertGuard(spec)(toy.model)
    return reloaded(toy.model)


@dataclass(frozen=True)
class Lab:
    """What the tests of the passes work with."""

    toy: Callable[..., Toy] = build_toy
    run: Callable[..., dict[str, Array]] = run_graph
    feeds: Callable[..., dict[str, Array]] = make_feeds
    insert: Callable[[Toy, GuardSpec], ir.Model] = insert
    reloaded: Callable[[ir.Model], ir.Model] = reloaded
    width: int = WIDTH
    layers: int = LAYERS


@pytest.fixture(scope="session")
def lab() -> Lab:
    return Lab()
