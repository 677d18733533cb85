"""Fold a guard into the weights: an affine edit that is always on needs no node of its own.

Requires: an unguarded decoder graph whose guarded FFN outputs are `x W + b`, W and b initialisers
(MatMul, MatMul with an Add, or Gemm). Leaves: the same graph with other numbers in W and b; an FFN
without a bias gets one Add where the guard moves the origin. Nothing marks the guard in the graph
then: what was folded where stands in the graph's metadata, and only a comparison with the graph it
was folded from can prove it (`VerifyFold`).

With y' = y + (y Q - offset) M Q^T, the edit as `edits` writes it::

    W' = W + (W Q) M Q^T                    low rank in, small middle, low rank out; never d x d
    b' = b + (b Q - offset) M Q^T           a push p adds alpha p to b and leaves W

in float64, rounded once to the dtype of W. So a folded float32 graph computes what the unfolded one
does within float32 rounding; in float16 each changed weight carries its own rounding besides.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from guardbake.errors import UnsupportedError
from guardbake.passes.edits import FLOAT16_MAX, low_rank
from guardbake.passes.insert import DIGEST_KEY, FOLD_KEY, refuse_guarded
from guardbake.passes.locate import SCOPES, locate
from guardbake.passes.projection import Projection, projection_of
from guardbake.spec import Edit, GuardSpec

Array = npt.NDArray[Any]
Read = Callable[[ir.TensorProtocol], Array]
_ROWS = 1024  # of a weight in float64 at a time: 4096 of width 4096 are 34 MB


def array_of(tensor: ir.TensorProtocol) -> Array:
    """The tensor's array, from external data through onnx-ir where that is where it lies."""
    return tensor.numpy()


@dataclass(frozen=True)
class FoldReport:
    """changed: the new weights by name, [d_ff, d] or transposed, still to be written as external
    data. sites: what was folded where, the JSON of the graph's metadata."""

    changed: tuple[str, ...]
    sites: dict[str, Any]


class FoldGuard:
    """The pass. `FoldGuard(spec)(model)` changes the model in place.

    read: gives a tensor's array; by default through onnx-ir. New weights are
    lazy tensors, computed each time they are asked for: one at a time is in memory.
    """

    def __init__(self, spec: GuardSpec, read: Read = array_of) -> None:
        self.spec = spec
        self.read = read
        self.tag = spec.digest[:12]

    def __repr__(self) -> str:
        return f"FoldGuard({self.tag})"

    def __call__(self, model: ir.Model) -> FoldReport:
        refuse_guarded(model)
        refuse_unfoldable(self.spec)
        found = locate(model.graph, [edit.site for edit in self.spec.edits])
        places = [
            projection_of(found[edit.site].value, edit.site, self.spec.model.width)
            for edit in self.spec.edits
        ]
        # nothing is changed before this line: a refused graph stays as it was
        changed: list[str] = []
        sites: dict[str, Any] = {}
        for edit, place in zip(self.spec.edits, places, strict=True):
            affine = affine_of(edit)
            weight = self._fold_weight(model.graph, edit, place, affine)
            bias = self._fold_bias(model.graph, edit, place, affine)
            sites[str(edit.site)] = {"value": place.output.name, "weight": weight, "bias": bias}
            changed += [weight["name"]] if weight else []
        model.metadata_props[DIGEST_KEY] = self.spec.digest
        model.metadata_props[FOLD_KEY] = json.dumps(sites, sort_keys=True)
        return FoldReport(tuple(changed), sites)

    def _fold_weight(
        self, graph: ir.Graph, edit: Edit, place: Projection, affine: Affine
    ) -> dict[str, Any] | None:
        """Put the new weight in the old one's place; says which, None if a push leaves it."""
        if affine.basis.shape[1] == 0:
            return None
        old = place.weight_tensor
        fresh = partial(_folded_tensor, self.read, old, affine, place.transposed)
        shape = ir.Shape(self.read(old).shape)
        tensor = ir.LazyTensor(fresh, old.dtype, shape, name=self._name(edit, "weight"))
        self._replace(graph, *place.weight, tensor)
        return _record(tensor, old, self.read)

    def _fold_bias(
        self, graph: ir.Graph, edit: Edit, place: Projection, affine: Affine
    ) -> dict[str, Any] | None:
        """Put the new bias in the old one's place, or make one; None if there is no need of one."""
        old = place.bias_tensor
        width = self.spec.model.width
        before = np.zeros(width) if old is None else self.read(old).astype(np.float64)
        after = before + affine.linear(before) + affine.shift
        if old is None and not after.any():
            return None
        dtype = place.weight_tensor.dtype
        array = narrowed(after, dtype.numpy())
        tensor = ir.tensor(array, dtype=dtype, name=self._name(edit, "bias"))
        if place.bias is not None:
            self._replace(graph, *place.bias, tensor)
        elif place.node.op_type == "Gemm":
            place.node.resize_inputs(3)
            self._replace(graph, place.node, 2, tensor)
        else:
            _add_bias(graph, place, self._value(graph, tensor))
        return _record(tensor, old, self.read)

    def _name(self, edit: Edit, role: str) -> str:
        """Of another guard another name: a runtime's cache must not take the one for the other."""
        return f"guardbake/{edit.site}/{self.tag}/{role}"

    def _value(self, graph: ir.Graph, tensor: ir.TensorProtocol) -> ir.Value:
        value = ir.val(str(tensor.name), const_value=tensor)
        graph.register_initializer(value)
        return value

    def _replace(
        self, graph: ir.Graph, node: ir.Node, index: int, tensor: ir.TensorProtocol
    ) -> None:
        old = node.inputs[index]
        node.replace_input_with(index, self._value(graph, tensor))
        if old is not None and not old.uses():
            del graph.initializers[str(old.name)]


def refuse_unfoldable(spec: GuardSpec) -> None:
    """Raises UnsupportedError, naming the reason, unless every edit is affine and always on."""
    reason = None
    if spec.profile != "always":
        reason = f"profile {spec.profile}: a gate decides call by call, weights cannot"
    for edit in spec.edits:
        if edit.kind == "care" and edit.fusion == "adaptive":
            reason = reason or f"adaptive fusion at {edit.site}: its weights depend on y"
        elif edit.kind not in ("care", "project", "add", "steer"):
            reason = reason or f"kind {edit.kind} at {edit.site}: not affine in y"
    if reason is not None:
        raise UnsupportedError(
            found=reason,
            expected="profile always, and care (parallel or sequential), project, add or steer",
            where=f"guard {spec.digest[:12]}",
            remedy="apply the guard without folding: its nodes cost little",
        )


@dataclass(frozen=True, eq=False)
class Affine:
    """y' = y + (y Q) M Q^T + shift, all float64: basis Q [d, K], middle M [K, K], shift [d]."""

    basis: Array
    middle: Array
    shift: Array

    def linear(self, rows: Array) -> Array:
        """(rows Q) M Q^T, [..., d] -> [..., d]."""
        return np.asarray((rows @ self.basis) @ self.middle @ self.basis.T)


def affine_of(edit: Edit) -> Affine:
    """The edit as one affine map; it must be one (see `refuse_unfoldable`)."""
    if edit.push is not None:
        shift = edit.strength * edit.push.astype(np.float64)
        return Affine(np.zeros((len(shift), 0)), np.zeros((0, 0)), shift)
    low = low_rank(edit)
    middle = np.diag(low.middle) if low.middle.ndim == 1 else low.middle
    return Affine(low.basis, middle, -(low.offset @ middle) @ low.basis.T)


def folded_rows(rows: Array, affine: Affine) -> Array:
    """W' of W [n, d] in float64."""
    wide = rows.astype(np.float64)
    return np.asarray(wide + affine.linear(wide))


def _folded_tensor(
    read: Read, old: ir.TensorProtocol, affine: Affine, transposed: bool
) -> ir.TensorProtocol:
    """The new weight in the old one's dtype and layout."""
    array = read(old)
    out = np.empty(array.shape, array.dtype)
    source, target = (array.T, out.T) if transposed else (array, out)
    for start in range(0, len(source), _ROWS):
        block = slice(start, start + _ROWS)
        target[block] = narrowed(folded_rows(source[block], affine), array.dtype)
    return ir.tensor(out, dtype=old.dtype, name=old.name)


def narrowed(array: Array, dtype: npt.DTypeLike) -> Array:
    """float64 rounded once to the weights' dtype; float16 ends at its largest number."""
    if np.dtype(dtype) == np.float16:
        array = array.clip(-FLOAT16_MAX, FLOAT16_MAX)
    return array.astype(dtype)


def _add_bias(graph: ir.Graph, place: Projection, bias: ir.Value) -> None:
    """y + b in y's place, named as exporters name it, so that the site is found again."""
    y, node = place.output, place.node
    users = list(y.uses())
    name = str(node.name).replace("MatMul", "Add")
    add = ir.node("Add", [y, bias], name=name if name != node.name else f"{name}/Add")
    add.outputs[0].name = f"{add.name}/output_0"
    add.outputs[0].type, add.outputs[0].shape = y.type, y.shape
    if SCOPES in node.metadata_props:
        add.metadata_props[SCOPES] = node.metadata_props[SCOPES]
    graph.insert_after(node, add)
    for user in users:
        user.node.replace_input_with(user.idx, add.outputs[0])
    for index, output in enumerate(graph.outputs):
        if output is y:
            graph.outputs[index] = add.outputs[0]


def _record(new: ir.TensorProtocol, old: ir.TensorProtocol | None, read: Read) -> dict[str, Any]:
    """Name and sha256 of a folded tensor, and of the one it was made from."""
    return {
        "name": new.name,
        "sha256": sha256_of(new.numpy()),
        "from": None if old is None else {"name": old.name, "sha256": sha256_of(read(old))},
    }


def sha256_of(array: Array) -> str:
    """Over the little-endian bytes of the array, row by row."""
    return hashlib.sha256(np.ascontiguousarray(array).view(np.uint8).data).hexdigest()
