"""Lowered decoders as engines: native layers, a float32 guard in them, every phase, two GPUs."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from guardbake.errors import SiteError
from guardbake.plugins import EngineSizes

from guardbake_tensorrt import Backend, build_engine
from guardbake_tensorrt.lower import Trunk, lower_graph, read_graph
from guardbake_tensorrt.network import ParsedNetwork, parse_network
from guardbake_tensorrt.presence import prove_in_graph, prove_in_network
from guardbake_tensorrt.sizes import profile_for
from tests.tensorrt.guards import LAYERS, guard_tiny

CAPACITY = 64
SIZES = EngineSizes(batch=(1, 1, 2), sequence=(1, 16, 32), past=(0, 16, 63))


def _parse(trunk: Trunk, path: Path, backend: Backend) -> ParsedNetwork:
    model = read_graph(path)
    lowered = lower_graph(path, model, cache="static", capacity=CAPACITY, trunk=trunk)
    return parse_network(backend, lowered)


@pytest.mark.parametrize("trunk", ["float32", "float16", "bfloat16"])
def test_the_network_has_native_layers_and_a_float32_guard(
    trunk: Trunk, tiny: Any, guard: Any, backend: Backend
) -> None:
    guarded = guard_tiny(tiny, guard, "pooling")
    prove_in_graph(read_graph(guarded.path), guarded.nodes, where="test")
    parsed = _parse(trunk, guarded.path, backend)
    found = prove_in_network(parsed.network, guarded.nodes, where="test")
    assert list(found) == list(guarded.nodes)
    types, dtypes = backend.module.LayerType, backend.module.DataType
    layers = [parsed.network.get_layer(i) for i in range(parsed.network.num_layers)]
    kinds = Counter(layer.type for layer in layers)
    assert kinds[types.KV_CACHE_UPDATE] == 2 * LAYERS
    assert kinds[types.ATTENTION_INPUT] == LAYERS
    assert kinds[types.SCATTER] == 0
    guards = {name for names in found.values() for name in names}
    products = [layer for layer in layers if layer.type == types.MATRIX_MULTIPLY]
    of_trunk = {"float16": dtypes.HALF, "bfloat16": dtypes.BF16, "float32": dtypes.FLOAT}[trunk]
    for layer in products:
        assert layer.get_output(0).dtype == (dtypes.FLOAT if layer.name in guards else of_trunk)
    assert sum(layer.name in guards for layer in products) == 5  # a reading, in and out of 2 edits
    for layer in layers:  # a mean of squares overflows float16 long before the values do
        if layer.type == types.REDUCE:
            assert layer.get_output(0).dtype in (dtypes.FLOAT, dtypes.INT64)


@pytest.mark.parametrize("trunk", ["float16", "bfloat16"])
@pytest.mark.parametrize(
    ("gate", "capacity"), [("token", None), ("sequence", None), ("pooling", CAPACITY)]
)
def test_a_lowered_decoder_compiles(
    gate: str,
    capacity: int | None,
    trunk: Trunk,
    tiny: Any,
    guard: Any,
    backend: Backend,
    tmp_path: Path,
) -> None:
    guarded = guard_tiny(tiny, guard, gate)
    growing = capacity is None
    record = build_engine(
        guarded.path,
        tmp_path / "decoder.engine",
        backend=backend,
        profile=profile_for(read_graph(guarded.path), SIZES, growing),
        guard_nodes=guarded.nodes,
        cache="growing" if growing else "static",
        capacity=capacity,
        trunk=trunk,
    )
    assert record.capabilities == ("SM89", "SM120")
    phases = ("prefill", "continued", "decode") if growing else ("prefill", "decode")
    assert record.profile.phases == phases
    assert [each.node for each in record.guard] == list(guarded.nodes)
    assert all(each.layers for each in record.guard)
    cache = {"cache": "growing"} if growing else {"cache": "static", "capacity": str(capacity)}
    chosen = cache | {"trunk": trunk}
    assert dict(record.settings) == {"TF32": "False", "STRICT_NANS": "True"} | chosen
    assert [name for name, _ in record.data_sha256] == ["decoder.onnx.data"]


def test_a_guard_stripped_from_the_lowered_graph_is_refused(
    tiny: Any, guard: Any, backend: Backend
) -> None:
    guarded = guard_tiny(tiny, guard, "sequence")
    model = read_graph(guarded.path)
    edit = next(node for node in model.graph if node.name == guarded.nodes[-1])
    for use in list(edit.outputs[0].uses()):
        use.node.replace_input_with(use.idx, edit.inputs[0])
    lowered = lower_graph(guarded.path, model, cache="static", capacity=CAPACITY, trunk="float16")
    with pytest.raises(SiteError, match="no layer of"):
        prove_in_network(parse_network(backend, lowered).network, guarded.nodes, where="test")
