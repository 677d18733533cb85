"""What an exported folder looks like, and when there is none."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from guardbake.errors import MalformedError, SiteError, UnsupportedError
from guardbake.site import Site
from guardbake.vlm.files import hash_files

from guardbake_onnx import OnnxExporter, tidy
from guardbake_onnx.capture import capture_decoder
from guardbake_onnx.description import read_description
from tests.onnx.conftest import Exported

GRAPHS = ("decoder", "vision", "embedding")


def test_a_second_export_has_the_same_bytes(exported: Exported, tmp_path: Path) -> None:
    files = hash_files(exported.vlm.folder)
    OnnxExporter().export(files, exported.captured, "stream", tmp_path)
    names = sorted(path.name for path in exported.folder.iterdir())
    assert names == sorted(path.name for path in tmp_path.iterdir())
    for name in names:
        assert (tmp_path / name).read_bytes() == (exported.folder / name).read_bytes(), name


def test_the_checker_accepts_every_graph(exported: Exported) -> None:
    for name in GRAPHS:
        onnx.checker.check_model(exported.folder / f"{name}.onnx", full_check=True)


def test_every_ffn_output_has_its_name_type_and_shape(exported: Exported) -> None:
    description = exported.runner.description
    graph = ir.load(exported.folder / "decoder.onnx").graph
    values = {value.name: value for node in graph for value in node.outputs}
    for layer in range(description.layers):
        value = values[Site(layer, "ffn_output").onnx_value]
        assert value.dtype == ir.DataType.FLOAT
        assert str(value.shape) == f"[batch,seq,{description.hidden}]"
        (user,) = value.uses()
        residual = user.node
        assert residual.op_type == "Add"
        assert residual.name == f"/model/layers.{layer}/Add_1"
        assert str(residual.outputs[0].shape) == f"[batch,seq,{description.hidden}]"


def test_the_decoder_is_made_of_standard_operators(exported: Exported) -> None:
    model = ir.load(exported.folder / "decoder.onnx")
    operators = [node.op_type for node in model.graph]
    layers = exported.runner.description.layers
    assert {node.domain for node in model.graph} == {""}
    assert operators.count("Attention") == layers
    assert operators.count("RMSNormalization") == 2 * layers + 1
    assert operators.count("RotaryEmbedding") == 2 * layers
    names = [node.name for node in model.graph]
    assert len(set(names)) == len(names)


def test_no_weight_is_transposed_at_run_time(exported: Exported) -> None:
    for name in GRAPHS:
        for node in ir.load(exported.folder / f"{name}.onnx").graph:
            if node.op_type == "Transpose":
                assert node.inputs[0] is not None
                assert not node.inputs[0].is_initializer(), node.name


def test_no_path_and_no_metadata_is_left(exported: Exported) -> None:
    for name in GRAPHS:
        proto = onnx.load(exported.folder / f"{name}.onnx", load_external_data=False)
        assert not proto.metadata_props
        assert not any(node.metadata_props or node.doc_string for node in proto.graph.node)
        raw = (exported.folder / f"{name}.onnx").read_bytes()
        assert not re.search(rb"\.py|site-packages|/home/|/root/", raw)


def test_the_description_is_read_back(exported: Exported, tmp_path: Path) -> None:
    description = read_description(exported.folder)
    assert description.model_digest == exported.vlm.model_digest
    (tmp_path / "model.json").write_text(description.to_json().replace('"layers"', '"layer"'))
    with pytest.raises(MalformedError, match="layer"):
        read_description(tmp_path)
    (tmp_path / "model.json").write_text(
        description.to_json().replace(f'"vocab": {description.vocab}', '"vocab": "many"')
    )
    with pytest.raises(MalformedError, match="vocab"):
        read_description(tmp_path)


def two_exits() -> ir.Graph:
    """An FFN whose inner product is used outside it as well."""
    x = ir.Value(name="x", shape=ir.Shape([1, 4]), type=ir.TensorType(ir.DataType.FLOAT))
    inner = ir.node("Relu", [x], name="inner")
    outer = ir.node("Neg", inner.outputs, name="outer")
    leak = ir.node("Add", [inner.outputs[0], outer.outputs[0]], name="leak")
    for node in (inner, outer):
        scopes = str(["", "language_model", "language_model.layers.0.mlp", node.name])
        node.metadata_props["pkg.torch.onnx.name_scopes"] = scopes
    for node in (inner, outer, leak):
        node.outputs[0].name = f"{node.name}_out"
    return ir.Graph([x], leak.outputs, nodes=[inner, outer, leak], opset_imports={"": 23})


def test_a_second_exit_of_an_ffn_is_refused() -> None:
    with pytest.raises(SiteError, match=r"2 values leaving it: \['inner_out', 'outer_out'\]"):
        tidy.single_leaving_value(two_exits(), "language_model.layers.0.mlp")


def test_a_missing_ffn_is_refused() -> None:
    with pytest.raises(SiteError, match="0 values"):
        tidy.single_leaving_value(two_exits(), "language_model.layers.1.mlp")


def test_windowed_layers_are_refused(exported: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    text = exported.vlm.model.config.get_text_config()
    monkeypatch.setattr(text, "layer_types", ["sliding_attention"], raising=False)
    with pytest.raises(UnsupportedError, match="sliding_attention"):
        capture_decoder(exported.vlm.model, exported.vlm.family)


def test_capture_leaves_the_model_as_it_was(exported: Exported) -> None:
    assert exported.vlm.model.config.get_text_config()._attn_implementation == "sdpa"
    assert exported.vlm.model.config.vision_config._attn_implementation == "sdpa"


def test_weights_are_stored_outside_the_graph(exported: Exported) -> None:
    proto = onnx.load(exported.folder / "decoder.onnx", load_external_data=False)
    inside = [t for t in proto.graph.initializer if t.data_location != t.EXTERNAL]
    assert all(np.prod(tensor.dims) * 8 <= 1024 * 2 for tensor in inside)
    assert (exported.folder / "decoder.onnx.data").stat().st_nlink == 1
