"""A folded graph is proved by folding the original again; each way of altering it is refused."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from guardbake.errors import IntegrityError
from guardbake.passes.fold import FoldGuard, FoldReport
from guardbake.passes.insert import FOLD_KEY
from guardbake.passes.verify_fold import VerifyFold
from guardbake.site import Site
from guardbake.spec import GuardSpec

AFFINE = ("care parallel", "care sequential", "project", "add", "steer")
SITE = Site(2, "ffn_output")


def verify(spec: GuardSpec, model: ir.Model, original: ir.Model) -> FoldReport:
    return VerifyFold(spec, "the toy", original)(model)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", AFFINE)
def test_a_whole_fold_passes(lab: Any, guard: Any, kind: str, bias: bool) -> None:
    spec, toy = guard("always", kind, edits=(1, 2), gains=True), lab.toy(bias=bias)
    FoldGuard(spec)(toy.model)
    model = lab.reloaded(toy.model)
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    assert len(verify(spec, model, lab.toy(bias=bias).model).sites) == 2
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before


def test_a_fold_of_another_machine_may_round_its_last_bit(lab: Any, guard: Any) -> None:
    spec, toy = guard("always", "care parallel"), lab.toy()
    FoldGuard(spec)(toy.model)
    model = lab.reloaded(toy.model)
    restate(model, "/weight", one_further)
    verify(spec, model, lab.toy().model)


def one_further(array: np.ndarray) -> np.ndarray:
    array.flat[0] = np.nextafter(array.flat[0], np.float32(np.inf))
    return array


def renumber(model: ir.Model, end: str, change: Callable[[np.ndarray], np.ndarray]) -> ir.Value:
    value = next(v for k, v in model.graph.initializers.items() if k.endswith(end))
    array = change(value.const_value.numpy().copy())
    value.const_value = ir.tensor(array, name=value.name)
    return value


def restate(model: ir.Model, end: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
    """Other numbers, and a record that was made to agree with them."""
    value = renumber(model, end, change)
    sites = json.loads(model.metadata_props[FOLD_KEY])
    record = sites[str(SITE)][end.strip("/")]
    record["sha256"] = hashlib.sha256(value.const_value.tobytes()).hexdigest()
    model.metadata_props[FOLD_KEY] = json.dumps(sites)


Fault = Callable[[ir.Model], object]


def product_of(model: ir.Model) -> ir.Node:
    return next(n for n in model.graph if str(n.name).endswith("layers.2/mlp/down_proj/MatMul"))


def bypass(model: ir.Model) -> None:
    add = next(node for node in model.graph if str(node.name).endswith("down_proj/Add"))
    for use in list(add.outputs[0].uses()):
        use.node.replace_input_with(use.idx, add.inputs[0])


def rewire(model: ir.Model) -> None:
    product_of(model).replace_input_with(1, model.graph.initializers["w1"])


def no_record(model: ir.Model) -> None:
    del model.metadata_props[FOLD_KEY]


def other_site(model: ir.Model) -> None:
    sites = json.loads(model.metadata_props[FOLD_KEY])
    model.metadata_props[FOLD_KEY] = json.dumps({"layers.1.ffn_output": sites.popitem()[1]})


def other_source(model: ir.Model) -> None:
    sites = json.loads(model.metadata_props[FOLD_KEY])
    sites[str(SITE)]["weight"]["from"]["sha256"] = "0" * 64
    model.metadata_props[FOLD_KEY] = json.dumps(sites)


def overridable(model: ir.Model) -> None:
    name = next(k for k in model.graph.initializers if k.endswith("/weight"))
    model.graph.inputs.append(model.graph.initializers[name])


FAULTS: dict[str, Fault] = {
    "weight x 1.01": lambda m: restate(m, "/weight", lambda a: a * np.float32(1.01)),
    "one entry of the weight": lambda m: restate(
        m, "/weight", lambda a: one_further(one_further(one_further(a)))
    ),
    "the weight damaged": lambda m: renumber(m, "/weight", one_further),
    "the bias flipped": lambda m: restate(m, "/bias", np.negative),
    "the bias damaged": lambda m: renumber(m, "/bias", one_further),
    "the bias of another shape": lambda m: restate(m, "/bias", lambda a: a[None]),
    "the bias passed by": bypass,
    "the projection rewired": rewire,
    "another weight": lambda m: renumber(m, "w1", one_further),
    "no record": no_record,
    "a record of another site": other_site,
    "a record of another source": other_source,
    "the weight overridable": overridable,
    "digest of another guard": lambda m: m.metadata_props.update({"guardbake.guard": "0" * 64}),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_refused(lab: Any, guard: Any, name: str) -> None:
    spec, toy = guard("always", "care parallel", gains=True), lab.toy()
    FoldGuard(spec)(toy.model)
    model = lab.reloaded(toy.model)
    verify(spec, model, lab.toy().model)
    FAULTS[name](model)
    with pytest.raises(IntegrityError, match="do not ship"):
        verify(spec, lab.reloaded(model), lab.toy().model)


def test_original_weights_under_the_folded_names_are_refused(lab: Any, guard: Any) -> None:
    spec, toy = guard("always", "project"), lab.toy()
    FoldGuard(spec)(toy.model)
    restate(toy.model, "/weight", lambda _: toy.weights[2])
    with pytest.raises(IntegrityError, match="other numbers"):
        verify(spec, lab.reloaded(toy.model), lab.toy().model)


def test_another_guard_and_another_original_are_refused(lab: Any, guard: Any) -> None:
    spec, toy = guard("always", "care parallel"), lab.toy()
    FoldGuard(spec)(toy.model)
    model = lab.reloaded(toy.model)
    with pytest.raises(IntegrityError, match="guard"):
        verify(guard("always", "care parallel", gains=True), model, lab.toy().model)
    with pytest.raises(IntegrityError, match="another fold"):
        verify(spec, model, lab.toy(scale=0.5).model)
    with pytest.raises(IntegrityError, match="guard none"):
        verify(spec, lab.toy().model, lab.toy().model)
