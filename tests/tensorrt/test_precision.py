"""Half precision round a float32 guard: no noisier than the model without a guard is."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from guardbake.errors import UnsupportedError, UsageError
from guardbake.spec import GuardSpec

from guardbake_tensorrt.lint import findings
from guardbake_tensorrt.lower import (
    Cache,
    LoweredGraph,
    Trunk,
    external_tensors,
    lower_graph,
    read_graph,
    write_lowered,
)
from guardbake_tensorrt.precision import cast_array
from tests.tensorrt.decoding import Array, Prompt, decode, mixed_prompt, open_decoder
from tests.tensorrt.emulation import emulate_half
from tests.tensorrt.guards import guard_tiny

CAPACITY = 32
TRUNKS: tuple[Trunk, ...] = ("float16", "bfloat16")
# An edited row is another hidden state, on which the trunk's rounding is another draw of noise.
ANOTHER_DRAW = 1.1


def _lower(path: Path, trunk: Trunk, cache: Cache = "static") -> LoweredGraph:
    capacity = CAPACITY if cache == "static" else None
    return lower_graph(path, read_graph(path), cache=cache, capacity=capacity, trunk=trunk)


def _run(
    path: Path, trunk: Trunk, prompt: Prompt, *, rounded: bool = True, cache: Cache = "static"
) -> list[dict[str, Array]]:
    """rounded: every operator's result, see `emulation`; else the file as onnxruntime runs it."""
    out = path.with_name(f"{cache}.{trunk}.{path.name}")
    if not out.exists():
        write_lowered(_lower(path, trunk, cache), out)
        emulate_half(out)
    return decode(open_decoder(out.with_name(f"emulated.{out.name}") if rounded else out), prompt)


def _noise(wanted: list[dict[str, Array]], found: list[dict[str, Array]], prompt: Prompt) -> float:
    """Root mean square error of the logits at real tokens; not a number if any of them is not."""
    errors = [
        (other["logits"].astype(np.float64) - one["logits"])[prompt.mask[:, call] == 1]
        for one, other, call in zip(wanted, found, prompt.calls, strict=True)
    ]
    return float(np.sqrt(np.mean(np.square(np.concatenate(errors)))))


@pytest.mark.parametrize(
    ("trunk", "rounded", "cache"),
    [
        ("float16", False, "growing"),
        ("float16", False, "static"),
        ("float16", True, "static"),
        ("bfloat16", True, "static"),
    ],
)
def test_the_guard_adds_no_noise_of_its_own(
    trunk: Trunk, rounded: bool, cache: Cache, tiny: Any, guard: Any
) -> None:
    path = guard_tiny(tiny, guard, "pooling").path
    for images in (True, False):
        prompt = mixed_prompt(tiny.width, tiny.mrope, images)
        floor, noise = (
            _noise(
                decode(open_decoder(each), prompt),
                _run(each, trunk, prompt, rounded=rounded, cache=cache),
                prompt,
            )
            for each in (tiny.path, path)
        )
        assert noise <= ANOTHER_DRAW * floor


@pytest.mark.parametrize("trunk", TRUNKS)
def test_the_verdicts_are_those_of_float32(trunk: Trunk, tiny: Any, guard: Any) -> None:
    path = guard_tiny(tiny, guard, "pooling").path
    prompt = mixed_prompt(tiny.width, tiny.mrope, with_images=True)
    wanted, found = decode(open_decoder(path), prompt), _run(path, trunk, prompt)
    last = wanted[1]["guard_score"][:, -1]  # the prompt's end, where the gate decides
    noise = np.abs(found[1]["guard_score"][:, -1] - last)
    assert (noise > 0).all()
    assert (np.abs(last) > 4 * noise).all()  # no score so near its threshold that it may flip
    for one, other in zip(wanted, found, strict=True):
        assert np.array_equal(one["guard_state_out"], other["guard_state_out"])
        assert np.array_equal(one["guard_open"], other["guard_open"])


@pytest.mark.parametrize("trunk", TRUNKS)
def test_a_guard_of_another_strength_is_told_from_noise(
    trunk: Trunk, tiny: Any, guard: Callable[..., GuardSpec]
) -> None:
    def weaker(*arguments: Any, **named: Any) -> GuardSpec:
        return guard(*arguments, **named, strength=0.5)

    prompt = mixed_prompt(tiny.width, tiny.mrope, with_images=True)
    wanted = decode(open_decoder(guard_tiny(tiny, guard, "pooling").path), prompt)
    floor = _noise(wanted, _run(guard_tiny(tiny, guard, "pooling").path, trunk, prompt), prompt)
    found = _run(guard_tiny(tiny, weaker, "pooling", threshold=1e-9).path, trunk, prompt)
    assert _noise(wanted, found, prompt) > 2 * floor


@pytest.mark.parametrize("trunk", TRUNKS)
def test_a_closed_guard_leaves_every_bit(trunk: Trunk, tiny: Any, guard: Any) -> None:
    path = guard_tiny(tiny, guard, "sequence", threshold=1e6).path
    prompt = mixed_prompt(tiny.width, tiny.mrope, with_images=True)
    plain, closed = (_run(each, trunk, prompt) for each in (tiny.path, path))
    for one, other in zip(plain, closed, strict=True):
        assert one["logits"].tobytes() == other["logits"].tobytes()


def test_an_edit_beyond_float16_saturates(tiny: Any, guard: Callable[..., GuardSpec]) -> None:
    def huge(*arguments: Any, **named: Any) -> GuardSpec:
        return guard(*arguments, **named, strength=1e6)

    guarded = guard_tiny(tiny, huge, "always", threshold=2.0)
    lowered = _lower(guarded.path, "float16")
    (edited,) = (node.outputs[0] for node in lowered.model.graph if node.name == guarded.nodes[0])
    lowered.model.graph.outputs.append(edited)
    out = guarded.path.with_name("saturated.onnx")
    write_lowered(lowered, out)
    prompt = mixed_prompt(tiny.width, tiny.mrope, with_images=False)
    for call in decode(open_decoder(emulate_half(out)), prompt):
        assert np.abs(call[str(edited.name)]).max() == 65504


@pytest.mark.parametrize("trunk", TRUNKS)
def test_half_precision_ends_at_the_borders(trunk: Trunk, tiny: Any, guard: Any) -> None:
    half = ir.DataType[trunk.upper()]
    lowered = _lower(guard_tiny(tiny, guard, "pooling").path, trunk)
    assert lowered.decomposable == ()
    model = lowered.model
    assert findings(model) == ()
    for value in (*model.graph.inputs, *model.graph.outputs):
        cached = str(value.name).startswith(("past_key_values.", "present."))
        assert (value.dtype == half) == cached, value.name
    for node in model.graph:
        dtypes = {value.dtype for value in (*node.inputs, *node.outputs) if value is not None}
        floats = dtypes & {half, ir.DataType.FLOAT}
        guards = node.domain == "guardbake"
        assert len(floats) < 2 or guards or node.op_type == "Cast", node.name
        if node.op_type in ("MatMul", "TRT_Attention", "RMSNormalization"):
            assert floats == {half}
        if node.op_type in ("Cos", "Sin"):
            assert floats == {ir.DataType.FLOAT}


def test_the_lowered_file_is_new_and_whole(tiny: Any, tmp_path: Path) -> None:
    source, data = tiny.path, tiny.path.with_name("decoder.onnx.data")
    before = [hashlib.sha256(each.read_bytes()).hexdigest() for each in (source, data)]
    lowered = _lower(source, "bfloat16")
    assert {Path(tensor.path) for tensor in external_tensors(lowered.model)} == {data}
    out = tmp_path / "half.onnx"
    write_lowered(lowered, out)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["half.onnx", "half.onnx.data"]
    onnx.checker.check_model(str(out), full_check=True)
    assert (tmp_path / "half.onnx.data").stat().st_size <= 0.51 * data.stat().st_size
    assert len(lowered.serialized) < 0.1 * data.stat().st_size
    for taken in (out, out.with_name("half.onnx.data")):
        other = taken.with_name("other.onnx")
        taken.rename(other if taken == out else other.with_name("other.onnx.data"))
        with pytest.raises(UsageError, match="there already"):
            write_lowered(lowered, other)
        for each in tmp_path.iterdir():
            each.rename(tmp_path / each.name.replace("other", "half"))
    assert [hashlib.sha256(each.read_bytes()).hexdigest() for each in (source, data)] == before


def test_a_weight_that_does_not_fit_is_named() -> None:
    large = np.array([1.0, 7e4], np.float32)
    with pytest.raises(UnsupportedError, match="up to 70000") as caught:
        cast_array(large, ir.DataType.FLOAT16, "model.norm.weight")
    assert "bfloat16" in caught.value.remedy
    assert "model.norm.weight" in caught.value.where
    assert np.isfinite(cast_array(large, ir.DataType.BFLOAT16, "w").astype(np.float32)).all()


def test_a_graph_exported_in_half_precision_stays_and_says_so(tiny: Any) -> None:
    for asked in ("float32", "float16"):
        halved = _lower(tiny.path, "float16", "growing").model
        lowered = lower_graph(tiny.path, halved, cache="static", capacity=CAPACITY, trunk=asked)
        assert lowered.trunk == "float16"
        assert lowered.decomposable == ()


def test_another_graph_than_float32_is_refused(tiny: Any) -> None:
    halved = _lower(tiny.path, "float16", "growing").model
    with pytest.raises(UnsupportedError, match="float32"):
        lower_graph(tiny.path, halved, trunk="bfloat16")
    untyped = read_graph(tiny.path)
    norm = next(node for node in untyped.graph if node.op_type == "RMSNormalization")
    norm.outputs[0].type = None
    with pytest.raises(UnsupportedError, match="no stated dtype"):
        lower_graph(tiny.path, untyped, trunk="float16")


def test_a_mask_of_numbers_is_refused(tiny: Any) -> None:
    model = read_graph(tiny.path)
    attention = next(node for node in model.graph if node.op_type == "Attention")
    cast = ir.node("Cast", [attention.inputs[3]], attributes={"to": ir.DataType.FLOAT})
    cast.outputs[0].name, cast.outputs[0].dtype = "numbers", ir.DataType.FLOAT
    model.graph.insert_before(attention, cast)
    attention.replace_input_with(3, cast.outputs[0])
    with pytest.raises(UnsupportedError, match="'numbers', computed beside the trunk"):
        lower_graph(tiny.path, model, trunk="float16")
