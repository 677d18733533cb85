"""A folded guard computes the law without a node of its own, and only a comparison can prove it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from guardbake import semantics as law
from guardbake.errors import IntegrityError, SiteError, UnsupportedError
from guardbake.passes.fold import FoldGuard, affine_of, folded_rows
from guardbake.passes.insert import InsertGuard
from guardbake.passes.verify import VerifyGuard
from guardbake.site import Site
from guardbake.spec import Edit, GuardSpec

AFFINE = ("care parallel", "care sequential", "project", "add", "steer")
# As in test_insert: three layers of 16 products each on values up to about 10.
FP32 = 3e-5
SITE = Site(2, "ffn_output")


def constants(model: ir.Model) -> dict[str, bytes]:
    return {
        name: value.const_value.tobytes()
        for name, value in model.graph.initializers.items()
        if value.const_value is not None
    }


def feeds_of(lab: Any, **shape: Any) -> dict[str, Any]:
    return {k: v for k, v in lab.feeds(**shape).items() if k != "guard_state"}


# ---- the law, without nodes


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("gains", [False, True])
@pytest.mark.parametrize("kind", AFFINE)
def test_a_folded_graph_computes_the_law(
    lab: Any, guard: Any, kind: str, gains: bool, bias: bool
) -> None:
    spec = guard("always", kind, edits=(1, 2), strength=0.7, gains=gains)
    toy = lab.toy(bias=bias)
    before, names = constants(toy.model), [node.name for node in toy.model.graph]
    feeds = feeds_of(lab)
    plain, expected = lab.run(toy.model, feeds), toy.law(spec, feeds)
    report = FoldGuard(spec)(toy.model)
    model = lab.reloaded(toy.model)
    assert np.abs(lab.run(model, feeds)["logits"] - expected["logits"]).max() < FP32
    assert np.abs(plain["logits"] - expected["logits"]).max() > 0.1
    assert not model.functions
    added = [str(node.name) for node in model.graph if node.name not in names]
    assert added == ([] if bias else [f"/model/layers.{i}/mlp/down_proj/Add" for i in (1, 2)])
    assert all(node.domain == "" for node in model.graph)
    after = constants(model)
    kept = {"w0", *(["b0"] if bias else [])} | ({"w1", "w2"} if kind == "steer" else set())
    assert {name: after[name] for name in kept} == {name: before[name] for name in kept}
    records = [site[role] for site in report.sites.values() for role in ("weight", "bias")]
    new = {record["name"] for record in records if record is not None}
    assert set(after) == kept | new
    assert set(report.changed) == {name for name in new if name.endswith("/weight")}


@pytest.mark.parametrize("gains", [False, True])
@pytest.mark.parametrize("kind", AFFINE)
def test_the_fold_is_exact(guard: Any, kind: str, gains: bool) -> None:
    """In float64 folded and unfolded agree to its own rounding, so only the last cast is lost."""
    edit = guard("always", kind, strength=1.7, gains=gains).edits[0]
    rng = np.random.default_rng(0)
    x, weight, bias = rng.standard_normal((4, 40)), rng.standard_normal((40, 16)), np.ones(16)
    affine = affine_of(edit)
    folded = x @ folded_rows(weight, affine) + folded_rows(bias, affine) + affine.shift
    wide = SimpleNamespace(
        kind=edit.kind,
        fusion=edit.fusion,
        strength=edit.strength,
        push=None if edit.push is None else edit.push.astype(np.float64),
        reference=None,
        branches=edit.branches,
    )
    assert np.abs(folded - law.edited(x @ weight + bias, wide)).max() < 1e-12


def without_centres(spec: GuardSpec) -> GuardSpec:
    def centred(edit: Edit) -> Edit:
        branches = tuple(replace(b, centre=b.centre * np.float32(0)) for b in edit.branches)
        return replace(edit, branches=branches)

    return replace(spec, edits=tuple(centred(edit) for edit in spec.edits))


def test_without_a_centre_not_even_an_add_is_needed(lab: Any, guard: Any) -> None:
    spec, toy = without_centres(guard("always", "project")), lab.toy()
    before = [node.name for node in toy.model.graph]
    report = FoldGuard(spec)(toy.model)
    assert [node.name for node in toy.model.graph] == before
    assert report.sites[str(SITE)]["bias"] is None
    got = lab.run(lab.reloaded(toy.model), feeds_of(lab))
    assert np.abs(got["logits"] - toy.law(spec, feeds_of(lab))["logits"]).max() < FP32


def test_a_weight_is_folded_block_by_block(guard: Any) -> None:
    """More rows than one block, in both layouts."""
    spec = guard("always", "care sequential", gains=True)
    weight = np.random.default_rng(0).standard_normal((2500, 16)).astype(np.float32)
    exact = folded_rows(weight, affine_of(spec.edits[0]))
    for op, stored in (("MatMul", weight), ("Gemm", weight.T.copy())):
        model = rows_graph(op, stored)
        (name,) = FoldGuard(spec)(model).changed
        folded = model.graph.initializers[name].const_value.numpy()
        assert folded.dtype == np.float32
        assert np.array_equal(folded.T if op == "Gemm" else folded, exact.astype(np.float32))


def test_several_sites_and_a_shared_weight(lab: Any, guard: Any) -> None:
    """Layer 0 reads the weight of layer 2 too: what the guard does not name stays as it was."""
    toy = lab.toy()
    shared = toy.node("/model/layers.2/mlp/down_proj/MatMul").inputs[1]
    toy.node("/model/layers.0/mlp/down_proj/MatMul").replace_input_with(1, shared)
    toy.weights[0] = toy.weights[2]
    spec = guard("always", "care parallel", edits=(1, 2))
    FoldGuard(spec)(toy.model)
    got = lab.run(lab.reloaded(toy.model), feeds_of(lab))
    assert np.abs(got["logits"] - toy.law(spec, feeds_of(lab))["logits"]).max() < FP32
    assert "w2" in toy.model.graph.initializers


@pytest.mark.parametrize(
    "toy",
    [
        {"name": lambda layer: f"n{layer}", "scopes": True},
        {"name": lambda layer: f"/lm/layers.{layer}/mlp/down_proj/MatMul"},
        {"opset": 13},
    ],
)
def test_sites_are_found_as_ever_and_found_again(lab: Any, guard: Any, toy: dict[str, Any]) -> None:
    """No function is inserted, so an old opset is no hindrance; the bias belongs to the site."""
    spec, made = guard("always", "care parallel"), lab.toy(**toy)
    FoldGuard(spec)(made.model)
    model = lab.reloaded(made.model)
    got = lab.run(model, feeds_of(lab))
    assert np.abs(got["logits"] - made.law(spec, feeds_of(lab))["logits"]).max() < FP32
    model.metadata_props.clear()
    again = FoldGuard(guard("always", "steer"))(model)
    assert again.sites[str(SITE)]["bias"]["from"] is not None


def rows_graph(op: str, weight: np.ndarray, bias: np.ndarray | None = None) -> ir.Model:
    """x [n, d_ff], hidden [n, d] -> logits [n, d] = hidden + x W + b."""
    n, width = "n", 16
    x = ir.val("x", ir.DataType.FLOAT, [n, weight.shape[1 if op in ("Gemm", "Transpose") else 0]])
    held: list[ir.Value] = []

    def constant(name: str, array: np.ndarray) -> ir.Value:
        held.append(ir.val(name, const_value=ir.tensor(array, name=name)))
        return held[-1]

    nodes = []
    operands = [x, constant("w", weight)]
    if op == "Transpose":
        nodes.append(ir.node("Transpose", [operands[1]], {"perm": [1, 0]}, name="turn"))
        operands[1] = nodes[0].outputs[0]
    if op == "Gemm" and bias is not None:
        operands.append(constant("b", bias))
    kind = "Gemm" if op == "Gemm" else "MatMul"
    product = ir.node(kind, operands, {"transB": 1} if op == "Gemm" else {})
    product.name = f"/model/layers.2/mlp/down_proj/{kind}"
    nodes.append(product)
    hidden = ir.val("hidden", ir.DataType.FLOAT, [n, width])
    last = ir.node("Add", [hidden, product.outputs[0]])
    nodes.append(last)
    for node in nodes:
        node.outputs[0].name = f"{node.name or 'residual'}/output_0"
        node.outputs[0].dtype, node.outputs[0].shape = ir.DataType.FLOAT, ir.Shape([n, width])
    last.name, last.outputs[0].name = "residual", "logits"
    graph = ir.Graph(
        [x, hidden],
        [last.outputs[0]],
        nodes=nodes,
        initializers=held,
        opset_imports={"": 23},
        name="rows",
    )
    return ir.Model(graph, ir_version=11)


@pytest.mark.parametrize(("op", "given"), [("Gemm", False), ("Gemm", True), ("Transpose", False)])
def test_other_spellings_of_a_projection_are_folded(
    lab: Any, guard: Any, op: str, given: bool
) -> None:
    """Gemm with a transposed weight, with and without a bias; a MatMul of a turned weight."""
    rng, spec = np.random.default_rng(1), guard("always", "care sequential", gains=True)
    weight = rng.standard_normal((16, 40)).astype(np.float32)
    bias = rng.standard_normal(16).astype(np.float32) if given else None
    model = rows_graph(op, weight, bias)
    x = rng.standard_normal((5, 40)).astype(np.float32)
    feeds = {"x": x, "hidden": np.zeros((5, 16), np.float32)}
    y = x @ weight.T + (0 if bias is None else bias)
    assert np.abs(lab.run(model, feeds)["logits"] - y).max() < FP32
    report = FoldGuard(spec)(model)
    got = lab.run(lab.reloaded(model), feeds)["logits"]
    assert np.abs(got - law.edited(y, spec.edits[0])).max() < 3 * FP32
    assert report.sites[str(SITE)]["weight"]["from"]["name"] == "w"


# ---- float16


def test_a_float16_weight_is_rounded_once_and_a_bias_saturates(lab: Any, guard: Any) -> None:
    spec, toy = guard("always", "care parallel"), lab.toy(dtype=ir.DataType.FLOAT16)
    exact = folded_rows(toy.weights[2], affine_of(spec.edits[0]))
    (name,) = FoldGuard(spec)(toy.model).changed
    folded = lab.reloaded(toy.model).graph.initializers[name].const_value.numpy()
    assert folded.dtype == np.float16
    assert np.array_equal(folded, exact.astype(np.float16))
    toy = lab.toy(dtype=ir.DataType.FLOAT16)
    FoldGuard(guard("always", "steer", strength=1e6))(toy.model)
    bias = next(v for k, v in toy.model.graph.initializers.items() if k.endswith("/bias"))
    assert np.abs(bias.const_value.numpy()).max() == 65504


# ---- refusals leave the graph alone


def refused(model: ir.Model, spec: GuardSpec, says: str, error: type[Exception]) -> None:
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    with pytest.raises(error, match=says) as caught:
        FoldGuard(spec)(model)
    assert caught.value.exit_code == 3  # type: ignore[attr-defined]
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before


@pytest.mark.parametrize(
    ("profile", "kind", "says"),
    [
        ("token", "project", "profile token"),
        ("sequence", "steer", "profile sequence"),
        ("always", "care", "adaptive fusion at layers.2"),
        ("always", "astra", "kind astra at layers.2"),
    ],
)
def test_what_is_not_affine_or_not_always_on_is_refused(
    lab: Any, guard: Any, profile: str, kind: str, says: str
) -> None:
    refused(lab.toy().model, guard(profile, kind), says, UnsupportedError)


def test_a_guarded_graph_is_refused_and_so_is_a_folded_one(lab: Any, guard: Any) -> None:
    spec = guard("always", "project")
    inserted, folded = lab.toy().model, lab.toy().model
    InsertGuard(spec)(inserted)
    FoldGuard(spec)(folded)
    for model in (inserted, folded):
        refused(model, spec, "unguarded export", UnsupportedError)
    with pytest.raises(UnsupportedError, match="unguarded export"):
        InsertGuard(spec)(folded)
    with pytest.raises(IntegrityError, match="folded"):
        VerifyGuard(spec, "the toy")(folded)


def test_a_missing_site_is_refused(lab: Any, guard: Any) -> None:
    refused(lab.toy().model, guard("always", "add", layers=9, edits=(7,)), "no match", SiteError)


def product_of(model: ir.Model) -> ir.Node:
    return next(n for n in model.graph if str(n.name).endswith("layers.2/mlp/down_proj/MatMul"))


def weight_computed(model: ir.Model) -> None:
    node = product_of(model)
    made = ir.node("Identity", [node.inputs[1]], name="dequantised")
    model.graph.insert_before(node, made)
    node.replace_input_with(1, made.outputs[0])


def weight_overridable(model: ir.Model) -> None:
    model.graph.inputs.append(product_of(model).inputs[1])


def another_producer(model: ir.Model) -> None:
    node = product_of(model)
    scaled = ir.node("Relu", [node.outputs[0]], name="relu")
    users = list(node.outputs[0].uses())
    model.graph.insert_after(node, scaled)
    for use in users:
        if use.node is not scaled:
            use.node.replace_input_with(use.idx, scaled.outputs[0])
    name, node.outputs[0].name = node.outputs[0].name, "hidden"
    scaled.outputs[0].name = name


def narrow_weight(model: ir.Model) -> None:
    value = product_of(model).inputs[1]
    value.const_value = ir.tensor(np.zeros((16, 8), np.float32), name="w2")
    value.shape = ir.Shape([16, 8])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (weight_computed, "computed by Identity"),
        (weight_overridable, "computed by nobody"),
        (another_producer, "Relu relu as its producer"),
        (narrow_weight, "shape"),
    ],
)
def test_a_projection_of_another_form_is_refused(
    lab: Any, guard: Any, change: Callable[[ir.Model], None], says: str
) -> None:
    model = lab.toy().model
    change(model)
    refused(model, guard("always", "project"), says, UnsupportedError)


def test_a_gemm_that_does_more_is_refused(guard: Any) -> None:
    model = rows_graph("Gemm", np.zeros((16, 40), np.float32))
    product = next(node for node in model.graph if node.op_type == "Gemm")
    product.attributes["alpha"] = ir.AttrFloat32("alpha", 0.5)
    refused(model, guard("always", "project"), "alpha", UnsupportedError)
