"""The edits as model-local functions: the law of `semantics` in ONNX operators.

Written from the law, never from the PyTorch reference: float32 whatever the model's dtype, cast
back saturating, low rank in, a small middle, low rank out.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from guardbake.passes.functions import Body
from guardbake.semantics import EPS
from guardbake.spec import Edit

FLOAT16_MAX = 65504.0


@dataclass(frozen=True, eq=False)
class LowRank:
    """An edit's subspaces side by side, float64: basis [d, K], offset [K], middle [K] or [K, K].

    offset is (mu_m Q_m) for each branch. What is added to y is (z middle) Q^T, z = y Q - offset:
    middle holds alpha_m gains_m and the sign for each coordinate, or, where the second branch sees
    what the first one left, the product of both.
    """

    basis: np.ndarray
    offset: np.ndarray
    middle: np.ndarray


def low_rank(edit: Edit) -> LowRank:
    """The subspaces of an edit that has branches."""
    bases = [b.basis.astype(np.float64) for b in edit.branches]
    gains = [
        np.ones(b.basis.shape[1]) if b.gains is None else b.gains.astype(np.float64)
        for b in edit.branches
    ]
    sign = 1.0 if edit.kind == "add" else -1.0
    middle = sign * np.concatenate(
        [b.strength * each for b, each in zip(edit.branches, gains, strict=True)]
    )
    if edit.fusion == "sequential":
        first, second = np.split(middle, [bases[0].shape[1]])
        middle = np.diag(middle)
        middle[: len(first), len(first) :] = first[:, None] * (bases[0].T @ bases[1]) * second
    offset = [b.centre.astype(np.float64) @ q for b, q in zip(edit.branches, bases, strict=True)]
    return LowRank(np.concatenate(bases, axis=1), np.concatenate(offset), middle)


def edit_inputs(edit: Edit) -> dict[str, np.ndarray]:
    """The arrays an edit's function takes after y (and open), by input name, in order.

    The branches of an edit stand side by side, so that the whole edit is one MatMul in and one
    MatMul out (see `LowRank`).
    """
    if edit.push is not None:
        arrays = {"push": edit.push, "strength": np.array([edit.strength])}
        if edit.reference is not None:
            arrays["reference"] = edit.reference
    else:
        low = low_rank(edit)
        middle = "scale" if low.middle.ndim == 1 else "mix"
        arrays = {"basis": low.basis, "offset": low.offset, middle: low.middle}
        if edit.kind == "replace":
            strength = np.array([edit.branches[0].strength])
            arrays = {"basis": low.basis, "offset": low.offset, "strength": strength}
    return {name: array.astype(np.float32) for name, array in arrays.items()}


def edit_function(
    name: str, edit: Edit, dtype: ir.DataType, gated: bool, opset: int
) -> ir.Function:
    """(y [B,S,d], [open [B,S]], arrays of `edit_inputs`) -> edited [B,S,d] in y's dtype.

    For replace: (y, open, text [B,k], last [B,S] bool, arrays) -> edited, and heard [B,k], z of
    each row's last token: what a text-only call is asked for and the other calls are told as text.
    """
    told = ["text", "last"] if edit.kind == "replace" else []
    op = Body(["y", *(["open"] if gated else []), *told, *edit_inputs(edit)])
    outputs: dict[str, ir.Value] = {}
    y = op("Cast", [op.inputs["y"]], {"to": ir.DataType.FLOAT})
    if edit.kind == "steer":
        change = op("Mul", [op.inputs["push"], op.inputs["strength"]])
    elif edit.kind == "astra":
        change = _away_from_push(op, y)
    elif edit.kind == "replace":
        z = op("Sub", [op("MatMul", [y, op.inputs["basis"]]), op.inputs["offset"]])
        wanted = op("Mul", [op.inputs["text"], op.inputs["strength"]])
        lacking = op("Sub", [op("Unsqueeze", [wanted, op.ints(1)]), z])
        change = op("MatMul", [lacking, op("Transpose", [op.inputs["basis"]], {"perm": [1, 0]})])
        outputs["heard"] = _at_last_token(op, z)
    else:
        change = _subspace_change(op, edit, y)
    edited = op("Add", [y, change])
    if dtype == ir.DataType.FLOAT16:
        limits = [op.constant(sign * FLOAT16_MAX, np.float32) for sign in (-1, 1)]
        edited = op("Clip", [edited, *limits])
    edited = op("Cast", [edited], {"to": dtype})
    if gated:
        open_ = op("Unsqueeze", [op.inputs["open"], op.ints(-1)])
        edited = op("Where", [open_, edited, op.inputs["y"]])
    return op.function(name, {"edited": edited} | outputs, opset)


def _at_last_token(op: Body, z: ir.Value) -> ir.Value:
    """z [B,S,k] at each row's last real token of this call, [B,k]; zeros where there is none."""
    last = op("Unsqueeze", [op.inputs["last"], op.ints(-1)])
    chosen = op("Where", [last, z, op.constant(0.0, np.float32)])
    return op("ReduceSum", [chosen, op.ints(1)], {"keepdims": 0})


def _away_from_push(op: Body, y: ir.Value) -> ir.Value:
    """What ASTRA adds to y: -alpha clip(cos(y - r, v), 0, 1) ||y|| v."""
    push, last = op.inputs["push"], op.ints(-1)
    away = op("Sub", [y, op.inputs["reference"]])
    toward = op("MatMul", [away, op("Unsqueeze", [push, last])])
    length = op("ReduceL2", [away, last], {"keepdims": 1})
    cosine = op("Div", [toward, op("Add", [length, op.constant(EPS, np.float32)])])
    bounds = [op.constant(bound, np.float32) for bound in (0.0, 1.0)]
    size = op("Mul", [op("Clip", [cosine, *bounds]), op("ReduceL2", [y, last], {"keepdims": 1})])
    # of the arrays alone, and so computed when the graph is loaded
    pull = op("Neg", [op("Mul", [push, op.inputs["strength"]])])
    return op("Mul", [size, pull])


def _subspace_change(op: Body, edit: Edit, y: ir.Value) -> ir.Value:
    """What is added to y: (weighted coordinates) Q^T."""
    basis = op.inputs["basis"]
    z = op("Sub", [op("MatMul", [y, basis]), op.inputs["offset"]])
    back = op("Transpose", [basis], {"perm": [1, 0]})
    if edit.fusion == "sequential":
        back = op("MatMul", [op.inputs["mix"], back])
    elif edit.kind == "care" and edit.fusion == "adaptive":
        z = _weighted_by_size(op, edit, z)
    else:  # Q times a row is done when the graph is loaded
        back = op("Transpose", [op("Mul", [basis, op.inputs["scale"]])], {"perm": [1, 0]})
    return op("MatMul", [z, back])


def _weighted_by_size(op: Body, edit: Edit, z: ir.Value) -> ir.Value:
    """Each branch's scaled coordinates times its share of their sizes, side by side as they are.

    A branch's part [B,S,M,K] is zero in the others' coordinates: no slice of z is taken, for whose
    sizes TensorRT would add 26 layers to its network.
    """
    ranks = [branch.basis.shape[1] for branch in edit.branches]
    number = np.repeat(np.arange(len(ranks)), ranks)
    member = op.constant(np.arange(len(ranks))[:, None] == number, np.float32)
    scale = op("Mul", [op.inputs["scale"], member])  # [M,K], when the graph is loaded
    parts = op("Mul", [op("Unsqueeze", [z, op.ints(2)]), scale])
    sizes = op("ReduceL2", [parts, op.ints(-1)], {"keepdims": 1})
    total = op("ReduceSum", [sizes, op.ints(2)], {"keepdims": 1})
    share = op("Div", [sizes, op("Add", [total, op.constant(EPS, np.float32)])])
    return op("ReduceSum", [op("Mul", [share, parts]), op.ints(2)], {"keepdims": 0})
