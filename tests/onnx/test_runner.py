"""The exported graphs against transformers, called directly."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from PIL import Image

from guardbake.batch import Batch
from guardbake.errors import MalformedError, UnsupportedError, UsageError
from guardbake.plugins import Trace
from guardbake.vlm.tokens import collate, positions

from guardbake_onnx import decoding
from guardbake_onnx.provider import open_session
from guardbake_onnx.runner import OnnxRunner
from tests.onnx.conftest import Exported, largest_difference
from tests.onnx.undefended import LOGITS, torch_trace

STEPS = 9


@pytest.fixture(scope="module")
def forced(mixed_batch: Batch) -> Any:
    shape = (len(mixed_batch.input_ids), STEPS)
    return np.random.default_rng(3).integers(8, 100, shape, dtype=np.int64)


@pytest.fixture(scope="module")
def trace(exported: Exported, mixed_batch: Batch, forced: Any) -> Trace:
    return exported.runner.run(mixed_batch, STEPS, forced_tokens=forced)


def test_logits_equal_transformers_on_a_mixed_left_padded_batch(
    exported: Exported, mixed_batch: Batch, forced: Any, trace: Trace
) -> None:
    assert len(set(mixed_batch.prompt_lengths.tolist())) == 3
    prefill, steps = torch_trace(exported.vlm, mixed_batch, forced)
    assert largest_difference(trace.prefill_logits[trace.valid], prefill[trace.valid]) <= LOGITS
    assert largest_difference(trace.step_logits, steps) <= LOGITS
    # the tolerance can tell: other rows' logits are further away than it by far
    assert largest_difference(trace.step_logits, np.roll(steps, 1, axis=0)) > 100 * LOGITS


def test_unmasked_padding_would_be_seen(
    exported: Exported, mixed_batch: Batch, forced: Any, trace: Trace
) -> None:
    """A planted fault: padding taken for tokens."""
    faulty = dataclasses.replace(
        mixed_batch, attention_mask=np.ones_like(mixed_batch.attention_mask)
    )
    seen = exported.runner.run(faulty, STEPS, forced_tokens=forced)
    padded = mixed_batch.prompt_lengths < mixed_batch.input_ids.shape[1]
    assert largest_difference(seen.step_logits[padded], trace.step_logits[padded]) > 100 * LOGITS
    assert largest_difference(seen.step_logits[~padded], trace.step_logits[~padded]) <= LOGITS


def test_wrong_positions_would_be_seen(
    exported: Exported,
    mixed_batch: Batch,
    forced: Any,
    trace: Trace,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A planted fault: positions that do not count, which only makes answers quietly worse."""
    monkeypatch.setattr(
        decoding, "positions", lambda *args, **named: positions(*args, **named) // 2
    )
    seen = exported.runner.run(mixed_batch, STEPS, forced_tokens=forced)
    assert largest_difference(seen.step_logits, trace.step_logits) > 10 * LOGITS


def test_padding_is_finite_too(trace: Trace) -> None:
    assert np.isfinite(trace.prefill_logits).all()


def test_a_picture_changes_the_answer(exported: Exported, mixed_batch: Batch, trace: Trace) -> None:
    pixels = mixed_batch.pixel_values
    assert pixels is not None
    other = dataclasses.replace(mixed_batch, pixel_values=np.zeros_like(pixels))
    changed = exported.runner.run(other, 1)
    assert largest_difference(changed.step_logits[:1], trace.step_logits[:1, :1]) > 100 * LOGITS
    assert largest_difference(changed.step_logits[1:2], trace.step_logits[1:2, :1]) <= LOGITS


@pytest.mark.parametrize("chunk", [1, 4, 7])
def test_chunked_prefill_equals_the_whole(
    exported: Exported, mixed_batch: Batch, forced: Any, trace: Trace, chunk: int
) -> None:
    chunked = exported.runner.run(mixed_batch, STEPS, forced_tokens=forced, chunk=chunk)
    valid = trace.valid
    assert largest_difference(chunked.prefill_logits[valid], trace.prefill_logits[valid]) <= LOGITS
    assert largest_difference(chunked.step_logits, trace.step_logits) <= LOGITS


def test_each_request_alone_equals_the_batch(
    exported: Exported, forced: Any, trace: Trace, mixed_batch: Batch
) -> None:
    noise = np.random.default_rng(7).integers(0, 255, (192, 192, 3), dtype=np.uint8)
    images = [Image.fromarray(noise), None, Image.new("RGB", (192, 192), "white")]
    for row, text in enumerate(["how to paint a wall", "open", "how to"]):
        processor, token = exported.vlm.processor, exported.vlm.image_token_id
        alone = collate(processor, token, [(text, images[row])])
        seen = exported.runner.run(alone, STEPS, forced_tokens=forced[row : row + 1])
        assert largest_difference(seen.step_logits[0], trace.step_logits[row]) <= LOGITS


def test_greedy_tokens_equal_generate(exported: Exported, mixed_batch: Batch) -> None:
    seen = exported.runner.run(mixed_batch, STEPS, keep_prefill=False)
    assert seen.prefill_logits.shape[1] == 1
    model: Any = exported.vlm.model
    feeds: dict[str, Any] = {"pixel_values": torch.from_numpy(mixed_batch.pixel_values)}
    if mixed_batch.image_grid_thw is not None:
        feeds["image_grid_thw"] = torch.from_numpy(mixed_batch.image_grid_thw)
        feeds["mm_token_type_ids"] = torch.from_numpy(mixed_batch.image_mask.astype(np.int64))
    out = model.generate(
        input_ids=torch.from_numpy(mixed_batch.input_ids),
        attention_mask=torch.from_numpy(mixed_batch.attention_mask),
        max_new_tokens=STEPS,
        do_sample=False,
        **feeds,
    )[:, mixed_batch.input_ids.shape[1] :].numpy()
    for row, length in enumerate(seen.lengths):
        assert seen.tokens[row, :length].tolist() == out[row, :length].tolist()


def test_text_only_batch_runs_without_vision(exported: Exported, forced: Any) -> None:
    requests = [("how to paint", None), ("open", None)]
    batch = collate(exported.vlm.processor, exported.vlm.image_token_id, requests)
    seen = OnnxRunner(exported.folder).run(batch, STEPS, forced_tokens=forced[:2])
    prefill, steps = torch_trace(exported.vlm, batch, forced[:2])
    assert largest_difference(seen.prefill_logits[seen.valid], prefill[seen.valid]) <= LOGITS
    assert largest_difference(seen.step_logits, steps) <= LOGITS


def test_an_image_token_in_the_answer_is_a_word(exported: Exported, mixed_batch: Batch) -> None:
    words = np.full((3, STEPS), exported.vlm.image_token_id, np.int64)
    seen = exported.runner.run(mixed_batch, STEPS, forced_tokens=words)
    _, steps = torch_trace(exported.vlm, mixed_batch, words)
    assert largest_difference(seen.step_logits, steps) <= LOGITS


def test_guard_state_and_taps_pass_through(
    exported: Exported, mixed_batch: Batch, forced: Any, tmp_path: Any
) -> None:
    """A stand-in guard: the state counts the real tokens fed, the score is one tap of the graph."""
    model = ir.load(exported.folder / "decoder.onnx")
    _add_counter(model)
    folder = tmp_path / "guarded"
    folder.mkdir()
    ir.save(model, folder / "decoder.onnx", external_data="decoder.onnx.data")
    for name in ("vision.onnx", "vision.onnx.data", "embedding.onnx", "embedding.onnx.data"):
        (folder / name).write_bytes((exported.folder / name).read_bytes())
    (folder / "model.json").write_bytes((exported.folder / "model.json").read_bytes())
    for chunk in (None, 5):
        seen = OnnxRunner(folder).run(mixed_batch, STEPS, forced_tokens=forced, chunk=chunk)
        fed = mixed_batch.input_ids.shape[1] + STEPS - 1
        assert seen.guard_score is not None
        assert seen.guard_score.shape == (3, fed, 1)
        assert seen.guard_state is not None
        assert seen.guard_state.tolist() == [STEPS - 1] * 3
        tap = seen.taps["tapped"]
        assert tap.shape == (3, fed, exported.runner.description.hidden)


def _add_counter(model: ir.Model) -> None:
    graph = model.graph
    mask = next(v for v in graph.inputs if v.name == "attention_mask")
    embeds = next(v for v in graph.inputs if v.name == "inputs_embeds")
    state = ir.Value(
        name="guard_state", shape=ir.Shape(["batch"]), type=ir.TensorType(ir.DataType.INT64)
    )
    graph.inputs.append(state)
    tape = ir.tape.Tape()
    axis = tape.initializer(ir.tensor(np.array([1], np.int64)), name="counter_axis")
    minus = tape.initializer(ir.tensor(np.array([-1], np.int64)), name="counter_minus")
    tokens = tape.op("Mul", [tape.op("Shape", [embeds], {"start": 1, "end": 2}), minus])
    big = tape.initializer(ir.tensor(np.array([2**40], np.int64)), name="counter_end")
    new = tape.op("Slice", [mask, tokens, big, axis])
    out = tape.op("Add", [state, tape.op("ReduceSum", [new, axis], {"keepdims": 0})])
    score = tape.op("ReduceMax", [embeds, minus], {"keepdims": 0})
    tapped = tape.op("Identity", [embeds])
    for value, name in ((out, "guard_state_out"), (score, "guard_score"), (tapped, "tapped")):
        value.name = name
        value.type = ir.TensorType(
            ir.DataType.INT64 if name == "guard_state_out" else ir.DataType.FLOAT
        )
        graph.outputs.append(value)
    graph.extend(tape.nodes)
    for value in tape.initializers:
        graph.register_initializer(value)


def test_answers_end_at_the_end_token(exported: Exported, mixed_batch: Batch) -> None:
    end = exported.runner.description.end_ids[0]
    words = np.full((3, 4), 9, np.int64)
    words[1, 1] = end
    seen = exported.runner.run(mixed_batch, 4, forced_tokens=words)
    assert seen.lengths.tolist() == [4, 2, 4]


def test_impossible_calls_are_refused(exported: Exported, mixed_batch: Batch) -> None:
    with pytest.raises(UsageError, match="forced tokens"):
        exported.runner.run(mixed_batch, 2, forced_tokens=np.zeros((1, 2), np.int64))
    with pytest.raises(UsageError, match="chunk 0"):
        exported.runner.run(mixed_batch, 2, chunk=0)
    without = dataclasses.replace(mixed_batch, pixel_values=None, image_grid_thw=None)
    with pytest.raises((UsageError, UnsupportedError), match="image"):
        exported.runner.run(without, 1)


def test_a_cut_graph_names_the_file(exported: Exported, tmp_path: Any) -> None:
    whole = (exported.folder / "vision.onnx").read_bytes()
    (tmp_path / "vision.onnx").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(MalformedError, match=r"vision\.onnx"):
        open_session(tmp_path / "vision.onnx", 1)


def test_running_and_writing_need_no_torch() -> None:
    code = (
        "import sys, guardbake_onnx.runner, guardbake_onnx.write;"
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
