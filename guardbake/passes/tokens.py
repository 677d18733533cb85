"""What a guard knows of the tokens of a call, found once for all its sensors, gates and edits.

They are the last S columns of the attention mask. Each is known by how many real tokens of the call
follow it: none follow the last, where a prompt ends that ends with the call, and one that ends at
real token n ends where `total - n` follow. All gates of a guard ask at the same token, and a
caller's slip opens them all, so both are found here.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from guardbake.passes.functions import INT64_MAX, Body
from guardbake.semantics import OPEN, TOKENS, UNDECIDED, joint_state
from guardbake.spec import GuardSpec


def tokens_function(name: str, spec: GuardSpec, opset: int) -> ir.Function:
    """The function for a guard with gates. like [B,S,C]: any value of the call's tokens, for their
    number. Profile `token`: (like, attention_mask [B,P+S]) -> real [B,S] bool.

    Profile `sequence`: (like, attention_mask, state [B]) -> asked [B,S] bool, the prompt's last
    real token while there is no verdict; from_end [B,S] bool, the real tokens from there on; known
    [B,1] int64, the state, with every gate open where the prompt's end was missed.
    A guard that remembers takes memory [B,3] besides, opens every gate too where the memory is not
    of this call, and gives real, and tokens [B,1] float32, how many have been real so far.
    With an edit `replace` it gives last [B,S] bool: each row's last real token of the call.
    """
    told = [] if spec.profile == "token" else ["state", *(["memory"] if spec.pools else [])]
    op = Body(["like", "attention_mask", *told])
    mask = op("Cast", [op.inputs["attention_mask"]], {"to": ir.DataType.INT64})
    start = op("Neg", [op("Shape", [op.inputs["like"]], {"start": 1, "end": 2})])
    new = op("Slice", [mask, start, op.ints(INT64_MAX), op.ints(1)])
    real = op("Equal", [new, op.number(1)])
    if spec.profile == "token":
        return op.function(name, {"real": real}, opset)
    total, here = (op("ReduceSum", [each, op.ints(1)], {"keepdims": 1}) for each in (mask, new))
    given = op("Unsqueeze", [op.inputs["state"], op.ints(1)])
    counted: dict[str, ir.Value] = {}
    if spec.pools:
        given, tokens = _remembered(op, spec, given, total, here)
        counted = {"real": real, "tokens": tokens}
    later = op("CumSum", [new, op.constant(1, np.int64)], {"exclusive": 1, "reverse": 1})
    following = op("Where", [real, later, op.number(INT64_MAX)])  # padding is at no end
    behind, known = _prompt_end(op, spec, given, total, here)
    outputs = {
        "asked": op("Equal", [following, behind]),
        "from_end": op("LessOrEqual", [following, behind]),
        "known": known,
        **counted,
    }
    if any(edit.kind == "replace" for edit in spec.edits):
        outputs["last"] = op("Equal", [following, op.number(0)])
    return op.function(name, outputs, opset)


def _prompt_end(
    op: Body, spec: GuardSpec, given: ir.Value, total: ir.Value, here: ir.Value
) -> tuple[ir.Value, ir.Value]:
    """[B,1] each: how many real tokens of the call follow the prompt's end, more than follow any
    where there is a verdict, for that is positive; and the state, with every gate open where the
    end was fed before this call and nobody was asked."""
    behind = op("Add", [total, given])
    fed_before = op("GreaterOrEqual", [behind, here])
    missed = op("And", [op("Less", [given, op.number(UNDECIDED)]), fed_before])
    known = op("Where", [missed, op.number(_all_open(spec)), given])
    ends_here = op("Equal", [given, op.number(UNDECIDED)])
    return op("Where", [ends_here, op.number(0), behind]), known


def _remembered(
    op: Body, spec: GuardSpec, given: ir.Value, total: ir.Value, here: ir.Value
) -> tuple[ir.Value, ir.Value]:
    """[B,1] each: the state, every gate open if the memory has not seen the tokens before this
    call and there is no verdict yet; and how many tokens the memory has seen after it."""
    seen = op("Gather", [op.inputs["memory"], op.ints(TOKENS)], {"axis": 1})
    before = op("Cast", [op("Sub", [total, here])], {"to": ir.DataType.FLOAT})
    decided = op("Greater", [given, op.number(UNDECIDED)])
    kept = op("Or", [decided, op("Equal", [before, seen])])
    tokens = op("Add", [seen, op("Cast", [here], {"to": ir.DataType.FLOAT})])
    return op("Where", [kept, given, op.number(_all_open(spec))]), tokens


def _all_open(spec: GuardSpec) -> int:
    """The state with every gate open."""
    return int(joint_state([np.array(OPEN)] * len(spec.sensors)))
