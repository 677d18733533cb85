"""The seam through which a bake builds its engine, and the sizes it asks for."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest

from guardbake.errors import UnsupportedError
from guardbake.plugins import EngineBuilder, EngineSizes, EngineTask, Number, Range
from guardbake.recipe_engine import EngineSection
from guardbake.steps.engines import sizes_of

from guardbake_tensorrt import EngineProfile, EngineRecord
from guardbake_tensorrt.engines import RtxEngines, TensorRtEngines
from guardbake_tensorrt.sizes import profile_for
from tests.tensorrt.guards import guard_tiny

_SIZES = EngineSizes(batch=(1, 1, 2), sequence=(1, 8, 16), past=(0, 8, 32))


def test_a_bake_gets_the_engine_and_its_record(guarded: Any, tmp_path: Path) -> None:
    builder: EngineBuilder = RtxEngines()
    assert builder.missing() is None
    phases: set[str] = set()
    digest, nodes = guarded.spec.digest, guarded.nodes
    task = EngineTask(guarded.path, "decoder", ("sm89",), _SIZES, digest, nodes)
    builder.build(task, tmp_path, lambda phase, *_: phases.add(phase))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "decoder.engine",
        "decoder.engine.json",
    ]
    record = EngineRecord.from_json((tmp_path / "decoder.engine.json").read_text())
    assert record.engine_bytes == (tmp_path / "decoder.engine").stat().st_size
    phases = ("prefill", "continued", "decode")
    assert record.profile == EngineProfile((1, 1, 2), (1, 8, 16), (0, 8, 32), phases)
    assert record.guard_digest == digest
    assert phases


def test_a_decoder_is_built_in_half_precision_and_with_a_static_cache(
    tiny: Any, tmp_path: Path
) -> None:
    tokens = tiny.width  # as many as the embeddings have columns, which are no cache for that
    task = EngineTask(tiny.path, "decoder", ("sm89",), _SIZES, number="bfloat16", capacity=tokens)
    RtxEngines().build(task, tmp_path, lambda *_: None)
    record = EngineRecord.from_json((tmp_path / "decoder.engine.json").read_text())
    assert record.profile.phases == ("prefill", "decode")
    wanted = {"cache": "static", "capacity": str(tokens), "trunk": "bfloat16"}
    assert wanted.items() <= dict(record.settings).items()
    line = RtxEngines().prepare(task, tmp_path)
    assert "--maxShapes=inputs_embeds:2x16x128,attention_mask:2x128,write_indices:2," in line


def _parts(path: Path, backend: Any) -> list[bool]:
    """Of a graph, part by part, whether the parser supports it: what `polygraphy inspect
    capability --with-partitioning` asks it."""
    network = backend.module.Builder(backend.logger).create_network(0)
    parser = backend.module.OnnxParser(network, backend.logger)
    whole = parser.supports_model_v2(path.read_bytes(), str(path))
    found = [parser.is_subgraph_supported(index) for index in range(parser.num_subgraphs)]
    backend.log.drain()
    return [*found, whole]


@pytest.mark.parametrize("number", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("capacity", [None, 64])
def test_what_is_prepared_is_supported_whole(
    number: Number, capacity: int | None, tiny: Any, guard: Any, backend: Any, tmp_path: Path
) -> None:
    made = guard_tiny(tiny, guard, "sequence")
    task = EngineTask(
        made.path, "decoder", ("sm89",), _SIZES, "1" * 64, made.nodes, number, capacity
    )
    RtxEngines().prepare(task, tmp_path)
    assert _parts(tmp_path / "decoder.onnx", backend) == [True, True]
    # as exported it is not: lowering is what makes it so
    assert False in _parts(made.path, backend)


def test_a_missing_library_is_a_reason_not_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    builder: EngineBuilder = TensorRtEngines()
    reason = builder.missing()
    assert reason is not None
    assert "tensorrt" in reason


def _graph(**inputs: list[int | str]) -> ir.Model:
    values = [
        ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.FLOAT))
        for name, shape in inputs.items()
    ]
    return ir.Model(ir.Graph(values, [], nodes=[]), ir_version=10)


def test_the_names_of_dimensions_say_how_large_they_are() -> None:
    sizes = EngineSizes(
        batch=(1, 1, 2), sequence=(1, 8, 16), images=(1, 2, 3), image_tokens=(4, 40, 80)
    )
    model = _graph(
        pixel_values=["4*tokens", 1176],
        window_index=["tokens"],
        cu_seqlens=["segments"],
        cu_window_seqlens=["windows"],
        image_features=["features", 16],
        pictures=["images", 3, 8, 8],
    )
    assert profile_for(model, sizes, growing=True).inputs == (
        ("pixel_values", (16, 1176), (160, 1176), (320, 1176)),
        ("window_index", (4,), (40,), (80,)),
        ("cu_seqlens", (2,), (3,), (4,)),
        ("cu_window_seqlens", (2,), (4,), (81,)),
        ("image_features", (0, 16), (32, 16), (32, 16)),
        ("pictures", (1, 3, 8, 8), (2, 3, 8, 8), (3, 3, 8, 8)),
    )


@pytest.mark.parametrize(
    ("past", "phases"),
    [
        ((0, 4, 8), ("prefill", "continued", "decode")),
        ((0, 0, 1), ("prefill", "continued", "decode")),
        ((0, 0, 0), ("prefill",)),
        ((4, 4, 8), ("continued", "decode")),
    ],
)
def test_a_growing_cache_has_a_profile_for_each_kind_of_call(past: Range, phases: Any) -> None:
    model = _graph(inputs_embeds=["batch", "seq", 16])
    model.graph.outputs.append(ir.Value(name="logits"))
    sizes = EngineSizes(past=past)
    assert profile_for(model, sizes, growing=True).phases == phases
    assert profile_for(model, sizes, growing=False).phases == ("prefill", "decode")


@pytest.mark.parametrize("dimension", ["frames", "tokens*4", "tokens + 1", "x*tokens"])
def test_a_dimension_that_means_nothing_known_is_refused(dimension: str) -> None:
    with pytest.raises(UnsupportedError, match="given"):
        profile_for(_graph(given=[dimension, 3]), EngineSizes(), growing=True)


def test_a_recipe_says_the_sizes_it_cares_about() -> None:
    section = EngineSection(backend="rtx", capabilities=["ada"], past=[0, 7, 9])
    assert sizes_of(section) == EngineSizes(past=(0, 7, 9))
    assert sizes_of(None) == EngineSizes()
