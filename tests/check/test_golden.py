"""Golden runs come back as they were written, and nothing else is taken for them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from guardbake.batch import Batch
from guardbake.check.golden import Golden, load_golden, save_golden
from guardbake.check.golden_vectors import GoldenVectors
from guardbake.errors import MalformedError
from guardbake.plugins import Trace


def _run() -> tuple[Batch, Trace]:
    ids = np.arange(6).reshape(2, 3)
    ones = np.ones((2, 3), np.int64)
    batch = Batch(ids, ones, ones == 0, None, None, instruction_ids=ids - 1)
    trace = Trace(
        tokens=ids,
        prefill_logits=np.zeros((2, 3, 4), np.float32),
        step_logits=np.ones((2, 3, 4), np.float32),
        lengths=np.array([3, 3]),
        valid=ones == 1,
        guard_score=None,
        guard_open=None,
        guard_state=None,
        taps={"edited/layers.0.ffn_output": np.zeros((2, 5, 4), np.float32)},
    )
    return batch, trace


def _golden() -> Golden:
    """One run, and vectors of one site of a guard without a gate."""
    mask = np.ones((2, 9), np.int64)
    reached = {"layers.0.ffn_output": np.ones((2, 9, 4), np.float32)}
    vectors = GoldenVectors(reached, mask, mask == 0, None)
    return Golden({"batch 0": _run()}, vectors, "f" * 64, 1e-6)


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "golden.safetensors"
    batch, trace = _run()
    save_golden(path, _golden())
    found = load_golden(path)
    again, seen = found.runs["batch 0"]
    assert (found.guard, found.noise) == ("f" * 64, 1e-6)
    assert found.vectors.scores is None
    shapes = {site: x.shape for site, x in found.vectors.reached.items()}
    assert shapes == {"layers.0.ffn_output": (2, 9, 4)}
    assert found.vectors.mask.sum() == 18
    assert not found.vectors.image_mask.any()
    assert np.array_equal(again.input_ids, batch.input_ids)
    assert again.pixel_values is None
    assert np.array_equal(np.asarray(again.instruction_ids), batch.input_ids - 1)
    assert np.array_equal(seen.step_logits, trace.step_logits)
    assert seen.prefill_logits.shape == (2, 1, 4)
    assert seen.guard_score is None
    assert seen.taps == {}


def test_half_precision_is_kept_and_float32_is_meant_where_nothing_is_said(tmp_path: Path) -> None:
    path = tmp_path / "golden.safetensors"
    floors = {"float16": {"logits": 0.01, "noise": 1e-3}}
    save_golden(path, replace(_golden(), number="float16", floors=floors))
    found = load_golden(path)
    assert (found.number, found.floors) == ("float16", floors)
    with safe_open(str(path), framework="np") as file:
        meta, names = file.metadata(), list(file.keys())
        arrays = {name: file.get_tensor(name) for name in names}
    save_file(arrays, path, {key: meta[key] for key in ("guardbake.golden", "guard", "noise")})
    found = load_golden(path)
    assert (found.number, found.floors, found.noise) == ("float32", {}, 1e-6)
    for wrong in ("[1]", '{"float16": 1}', '{"float16": {"logits": null}}', "{"):
        save_file(arrays, path, {**meta, "floors": wrong})
        with pytest.raises(MalformedError):
            load_golden(path)


def test_the_same_runs_are_the_same_bytes(tmp_path: Path) -> None:
    """Often enough: a random order of two entries is the same 12 times in 2000 cases only."""
    for name in "ab" * 6:
        save_golden(tmp_path / name, _golden())
        assert (tmp_path / name).read_bytes() == (tmp_path / "a").read_bytes()


@pytest.mark.parametrize("keep", [0, 9, 200])
def test_a_truncated_file_is_malformed(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "golden.safetensors"
    save_golden(path, _golden())
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(MalformedError):
        load_golden(path)


def test_another_safetensors_file_is_malformed(tmp_path: Path) -> None:
    path = tmp_path / "golden.safetensors"
    save_file({"x": np.zeros(3)}, path)
    with pytest.raises(MalformedError, match="golden runs"):
        load_golden(path)
