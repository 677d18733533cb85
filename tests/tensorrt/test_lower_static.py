"""The static cache computes what the growing one does, for every guard, in the very same file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from guardbake.errors import UnsupportedError, UsageError

from guardbake_tensorrt.lint import findings
from guardbake_tensorrt.lower import lower_graph, read_graph
from guardbake_tensorrt.native import NATIVE_DOMAIN
from tests.tensorrt.decoding import Array, decode, mixed_prompt, open_decoder
from tests.tensorrt.guards import GATES, HEAD, LAYERS, guard_tiny

CAPACITY = 48
# Two float32 renderings add up the same numbers in two orders: in each layer the 32 products of a
# score, then the weighted values of up to 48 columns. Each addition errs by up to 2**-24 of what is
# summed, and errors of either sign grow with the square root of their number.
REORDERED = LAYERS * (HEAD + CAPACITY) ** 0.5 * 2.0**-24


def _lowered(path: Path, name: str) -> Path:
    """The static rendering beside the growing one, whose weights it shares."""
    lowered = lower_graph(path, read_graph(path), cache="static", capacity=CAPACITY)
    out = path.with_name(name)
    out.write_bytes(lowered.serialized)
    return out


def _require_same(
    wanted: list[dict[str, Array]], found: list[dict[str, Array]], mask: Array
) -> None:
    """Floats within REORDERED of the largest, at real tokens; verdicts and states exactly."""
    assert len(wanted) == len(found)
    at = 0
    for one, other in zip(wanted, found, strict=True):
        assert one.keys() == other.keys()
        tokens = one["logits"].shape[1]
        real = mask[:, at : at + tokens] == 1
        at += tokens
        for name, value in one.items():
            kept = real if value.shape[:2] == real.shape else slice(None)
            a, b = value[kept], other[name][kept]
            if a.dtype == np.float32:
                assert np.isfinite(b).all(), name
                assert np.abs(a - b).max(initial=0) <= REORDERED * np.abs(a).max(initial=1), name
            else:
                assert np.array_equal(a, b), name


@pytest.mark.parametrize("gate", GATES)
def test_a_static_cache_computes_what_a_growing_one_does(gate: str, tiny: Any, guard: Any) -> None:
    path = guard_tiny(tiny, guard, gate).path
    growing = open_decoder(path)
    static = open_decoder(_lowered(path, f"{gate}.static.onnx"))
    unguarded = open_decoder(tiny.path)
    opened = set()
    for images in (True, False):
        prompt = mixed_prompt(tiny.width, tiny.mrope, images)
        wanted = decode(growing, prompt)
        _require_same(wanted, decode(static, prompt), prompt.mask)
        starts = np.array([0, 7, CAPACITY - prompt.mask.shape[1]])
        _require_same(wanted, decode(static, prompt, starts), prompt.mask)
        opened |= {bool(o) for call in wanted for k in call if "open" in k for o in call[k][:, -1]}
        changed = decode(unguarded, prompt)[-1]["logits"] - wanted[-1]["logits"]
        assert np.abs(changed).max() > 100 * REORDERED
    assert opened == ({True, False} if gate != "always" else set())


def test_the_file_is_valid_onnx_and_clean(tiny: Any) -> None:
    path = _lowered(tiny.path, "static.onnx")
    lowered = lower_graph(tiny.path, read_graph(tiny.path), cache="static", capacity=CAPACITY)
    assert len(lowered.decomposable) == LAYERS
    onnx.checker.check_model(str(path), full_check=True)
    model = ir.load(path)
    assert findings(model) == ()
    assert {node.op_type for node in model.graph if node.domain == NATIVE_DOMAIN} == {
        "TRT_Attention",
        "TRT_KVCacheUpdate",
    }
    shapes = {str(value.name): value.shape for value in (*model.graph.inputs, *model.graph.outputs)}
    for layer in range(LAYERS):
        for kind in ("key", "value"):
            past = shapes[f"past_key_values.{layer}.{kind}"]
            assert past == shapes[f"present.{layer}.{kind}"] == ["batch", 2, CAPACITY, HEAD]
    assert not [n for n in model.graph if n.op_type == "Attention"]


def test_the_choice_of_cache_is_explicit(tiny: Any) -> None:
    for choice in (
        {"cache": "static"},
        {"capacity": 8},
        {"cache": "growing", "capacity": 8},
        {"cache": "static", "capacity": 0},
    ):
        with pytest.raises(UsageError, match="cache with capacity"):
            lower_graph(tiny.path, read_graph(tiny.path), **choice)


def _node(model: ir.Model, op_type: str) -> ir.Node:
    return next(node for node in model.graph if node.op_type == op_type)


def _let_padding_be_seen(model: ir.Model) -> None:
    node = _node(model, "And")
    node.replace_input_with(1, node.inputs[0])


def _let_the_future_be_seen(model: ir.Model) -> None:
    node = _node(model, "LessOrEqual")
    node.op_type = "GreaterOrEqual"


def _add_a_window(model: ir.Model) -> None:
    causal = _node(model, "LessOrEqual")
    readers = list(causal.outputs[0].uses())
    size = ir.val("window", const_value=ir.tensor(np.array(64), name="window"))
    model.graph.register_initializer(size)
    shifted = ir.node("Sub", [causal.inputs[1], size])
    inside = ir.node("Greater", [causal.inputs[0], shifted.outputs[0]])
    both = ir.node("And", [causal.outputs[0], inside.outputs[0]])
    model.graph.insert_after(causal, [shifted, inside, both])
    for use in readers:
        use.node.replace_input_with(use.idx, both.outputs[0])


@pytest.mark.parametrize(
    "fault",
    [_let_padding_be_seen, _let_the_future_be_seen, _add_a_window],
    ids=lambda f: f.__name__,
)
def test_another_mask_is_refused(fault: Callable[[ir.Model], None], tiny: Any) -> None:
    model = read_graph(tiny.path)
    fault(model)
    with pytest.raises(UnsupportedError, match="mask"):
        lower_graph(tiny.path, model, cache="static", capacity=8)


def _read_the_cache_besides(model: ir.Model) -> None:
    present = _node(model, "Attention").inputs[1]
    copy = ir.node("Identity", [present], name="copy")
    model.graph.append(copy)


def _read_the_cache_size(model: ir.Model) -> None:
    past = next(value for value in model.graph.inputs if "past" in str(value.name))
    size = ir.node("Shape", [past], attributes={"start": 2, "end": 3}, name="size")
    size.outputs[0].name = "size"
    model.graph.append(size)
    model.graph.outputs.append(size.outputs[0])


def _cap_the_scores(model: ir.Model) -> None:
    _node(model, "Attention").attributes["softcap"] = ir.AttrFloat32("softcap", 30.0)


def _join_along_the_heads(model: ir.Model) -> None:
    concat = _node(model, "Attention").inputs[2].producer()  # type: ignore[union-attr]
    assert concat is not None
    concat.attributes["axis"] = ir.AttrInt64("axis", 1)


@pytest.mark.parametrize(
    "fault",
    [_read_the_cache_besides, _read_the_cache_size, _cap_the_scores, _join_along_the_heads],
    ids=lambda f: f.__name__,
)
def test_another_cache_is_refused(fault: Callable[[ir.Model], None], tiny: Any) -> None:
    model = read_graph(tiny.path)
    fault(model)
    with pytest.raises(UnsupportedError, match="keep the growing cache"):
        lower_graph(tiny.path, model, cache="static", capacity=8)
