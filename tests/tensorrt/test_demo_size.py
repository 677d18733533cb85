"""Decoders of the demo's size, both families, in half precision: every phase, two GPUs, a guard."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from guardbake.plugins import EngineSizes

from guardbake_tensorrt import Backend, build_engine
from guardbake_tensorrt.lower import Trunk, read_graph
from guardbake_tensorrt.sizes import profile_for

BENCH = Path(__file__).parents[2] / "tools" / "bench" / "engine.py"
SIZES = EngineSizes(batch=(1, 1, 4), sequence=(1, 256, 512), past=(0, 512, 1023))


@pytest.fixture(scope="module", params=["llava", "qwen2_5_vl"])
def decoder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The folder of a guarded one of random weights, as the benches make it, and what it is."""
    folder = tmp_path_factory.mktemp("demo")
    sizes = ["--size", "demo", "--family", request.param, "--number", "float32"]
    subprocess.run([sys.executable, str(BENCH), str(folder), "--make", *sizes], check=True)
    yield folder, json.loads((folder / "made.json").read_text())
    (folder / "weights.data").unlink()  # half a gigabyte


@pytest.mark.parametrize("trunk", ["float16", "bfloat16"])
def test_a_guarded_decoder_of_the_demos_size_is_built(
    decoder: tuple[Path, dict[str, Any]], trunk: Trunk, backend: Backend, tmp_path: Path
) -> None:
    folder, made = decoder
    graph, engine = folder / "guarded.onnx", tmp_path / "decoder.engine"
    record = build_engine(
        graph,
        engine,
        backend=backend,
        capabilities=("sm89", "sm120"),
        profile=profile_for(read_graph(graph), SIZES, growing=True),
        guard_nodes=made["nodes"],
        guard_digest=made["guard"],
        trunk=trunk,
    )
    assert record.capabilities == ("SM89", "SM120")
    assert record.profile.phases == ("prefill", "continued", "decode")
    assert [each.node for each in record.guard] == made["nodes"]
    assert all(each.layers for each in record.guard)
    assert made["parameters"] * 2 < engine.stat().st_size < made["parameters"] * 2.5
    engine.unlink()
