"""Decoders of the demo's size, both families, in half precision: every phase, two GPUs, a guard."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest

from guardbake.plugins import EngineSizes

from guardbake_tensorrt import Backend, build_engine
from guardbake_tensorrt.lower import Trunk, read_graph
from guardbake_tensorrt.sizes import profile_for

BENCH = Path(__file__).parents[2] / "tools" / "bench"
SIZES = EngineSizes(batch=(1, 1, 4), sequence=(1, 256, 512), past=(0, 512, 1023))


@pytest.fixture(scope="module", params=["llava", "qwen2_5_vl"])
def decoders(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Of random weights, as the benches measure them."""
    folder = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCH)
        made = importlib.import_module("random_decoders")
        yield made.random_decoders(request.param, "demo", "float32", folder, shared=False)
    (folder / made.DATA).unlink()  # half a gigabyte


@pytest.mark.parametrize("trunk", ["float16", "bfloat16"])
def test_a_guarded_decoder_of_the_demos_size_is_built(
    decoders: Any, trunk: Trunk, backend: Backend, tmp_path: Path
) -> None:
    engine = tmp_path / "decoder.engine"
    record = build_engine(
        decoders.guarded,
        engine,
        backend=backend,
        capabilities=("sm89", "sm120"),
        profile=profile_for(read_graph(decoders.guarded), SIZES, growing=True),
        guard_nodes=decoders.nodes,
        guard_digest=decoders.spec.digest,
        trunk=trunk,
    )
    assert record.capabilities == ("SM89", "SM120")
    assert record.profile.phases == ("prefill", "continued", "decode")
    assert [each.node for each in record.guard] == list(decoders.nodes)
    assert all(each.layers for each in record.guard)
    assert decoders.parameters * 2 < engine.stat().st_size < decoders.parameters * 2.5
    engine.unlink()
