"""Fuse mrope's rotation into the standard RotaryEmbedding operator.

onnxscript's own rule wants Cos and Sin right behind the doubled angles; Qwen2.5-VL first chooses
the angles' axis section by section and then doubles cosine and sine. The operator rotates by the
same halves either way, so the fusion is exact.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
from onnxscript.rewriter import pattern


class FuseDoubledRotary(pattern.RewriteRuleClassBase):
    """x * [c, c] + [-x2, x1] * [s, s] -> RotaryEmbedding(x, c, s), x [B, heads, S, head_dim]."""

    def __init__(self) -> None:
        # cosine and sine are shared by every layer
        super().__init__(name="FuseDoubledRotary", remove_nodes=False)

    def pattern(
        self,
        op: Any,
        x: Any,
        cos: Any,
        sin: Any,
        start: Any,
        middle: Any,
        middle_again: Any,
        end: Any,
        cos_axis: Any,
        sin_axis: Any,
    ) -> Any:
        low = op.Slice(x, start, middle, [3], [1])
        high = op.Slice(x, middle_again, end, [3], [1])
        turned = op.Concat(op.Neg(high), low, axis=-1)
        cosine = op.Unsqueeze(op.Concat(cos, cos, axis=-1), cos_axis)
        sine = op.Unsqueeze(op.Concat(sin, sin, axis=-1), sin_axis)
        return x * cosine + turned * sine

    def check(  # type: ignore[override]
        self,
        context: Any,
        x: ir.Value,
        start: ir.Value,
        middle: ir.Value,
        middle_again: ir.Value,
        end: ir.Value,
        cos_axis: ir.Value,
        sin_axis: ir.Value,
        **bound: ir.Value,
    ) -> Any:
        """Whether x is cut into equal halves and cosine and sine are spread along the heads."""
        result = pattern.MatchResult()
        if x.shape is None or len(x.shape) != 4 or not isinstance(x.shape[3], int):
            return result.fail("x is not [B, heads, S, a known head size]", x)
        half = x.shape[3] // 2
        wanted = ((start, 0), (middle, half), (middle_again, half), (cos_axis, 1), (sin_axis, 1))
        if any(_scalar(value) != number for value, number in wanted):
            return result.fail("x is not cut into halves, or not along heads")
        last = _scalar(end)
        if last is None or last < x.shape[3]:
            return result.fail("the second half ends early", end)
        return result

    def rewrite(self, op: Any, x: ir.Value, cos: ir.Value, sin: ir.Value, **bound: ir.Value) -> Any:
        heads = None if x.shape is None else x.shape[1]
        return op.RotaryEmbedding(x, cos, sin, interleaved=0, num_heads=heads)


def fuse_doubled_rotary(model: ir.Model) -> int:
    """Apply the rule everywhere; returns how often it did."""
    rule = FuseDoubledRotary.rule()  # type: ignore[no-untyped-call]
    rules = pattern.RewriteRuleSet([rule])
    return int(rules.apply_to_model(model))


def _scalar(value: ir.Value) -> int | None:
    """The number in a constant of one element, else None."""
    tensor = value.const_value
    return int(tensor.numpy().reshape(-1)[0]) if tensor is not None and tensor.size == 1 else None
