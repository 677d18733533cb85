"""`guardbake build`: engines of a bundle in a folder of their own, or an error that says why."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from guardbake.artifact import save_guard
from guardbake.bundle.engine_folder import verify_engine_folder
from guardbake.bundle.files import describe
from guardbake.bundle.manifest import DECODER

from guardbake_tensorrt import Backend, EngineRecord
from guardbake_tensorrt.lower import read_graph
from tests.tensorrt.bundles import Built, change_decoder

Run = Callable[..., int]
RTX = ("--backend", "tensorrt-rtx")


def test_every_graph_of_a_bundle_isbuilt_and_bound_to_it(
    built: Built, bundle: Path, guarded: Any, backend: Backend
) -> None:
    out = built.folder
    found = verify_engine_folder(out, bundle)
    assert [each.engine.name for each in found.engines] == [
        "decoder.engine", "embedding.engine", "vision.engine",
    ]  # fmt: skip
    record = EngineRecord.from_json((out / "decoder.engine.json").read_text())
    assert (record.backend, record.version) == ("rtx", backend.version)
    assert record.capabilities == ("SM89",)
    assert record.guard_digest == guarded.spec.digest
    assert (record.graph, record.onnx_sha256) == (DECODER, describe(bundle, DECODER).sha256)
    assert record.profile.phases == ("prefill", "continued", "decode")
    assert (record.profile.seq, record.profile.past) == ((1, 4, 8), (0, 4, 16))
    assert record.profile.batch == (1, 1, 4)
    assert 0 < record.guard_layers < record.layers
    vision = EngineRecord.from_json((out / "vision.engine.json").read_text())
    assert (vision.guard_digest, vision.guard, vision.guard_layers) == (None, (), 0)
    shapes = ("pixel_values", (1, 3, 4, 4), (1, 3, 4, 4), (4, 3, 4, 4))
    assert vision.profile.inputs == (shapes,)


def test_it_says_what_the_guard_costs_and_how_far_it_is(built: Built, guarded: Any) -> None:
    out, said = built.folder, built.output
    record = EngineRecord.from_json((out / "decoder.engine.json").read_text())
    layers = f"{len(guarded.nodes)} nodes became {record.guard_layers} of {record.layers}"
    assert f"guard {guarded.spec.digest[:12]}: {layers}" in said
    for each in record.guard:
        assert f"  {len(each.layers):>5} {each.node}\n" in said
    assert "by tensorrt-rtx" in said
    assert "never run" in said
    events = [json.loads(line) for line in built.progress.splitlines() if line.startswith("{")]
    assert [e["stage"] for e in events if e["event"] == "end"] == ["decoder", "embedding", "vision"]
    assert any(e["event"] == "advance" and e["done"] <= e["total"] for e in events)


def test_verify_knows_a_folder_of_engines(
    built: Built, bundle: Path, tmp_path: Path, run: Run
) -> None:
    engines = shutil.copytree(built.folder, tmp_path / "engines")
    assert run("verify", engines, "--built-from", bundle) == 0
    (engines / "decoder.engine").write_bytes(b"another")
    assert run("verify", engines) == 6


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (("--gpu", "rtx-45"), 2, "rtx-40"),
        (("--gpu", "jetson-orin"), 3, "backend tensorrt"),
        (("--gpu", "h100"), 3, "H100"),
        (("--batch", "4,1,2"), 2, "smallest <= best <= largest"),
        (("--past", "many"), 2, "--past 'many'"),
        (("--graph", "encoder"), 2, "one of decoder, embedding, vision"),
        (("--guard", "none.safetensors"), 9, "none.safetensors"),
    ],
)
def test_what_cannot_bebuilt_says_why_and_leaves_nothing(
    bundle: Path,
    tmp_path: Path,
    run: Run,
    capsys: pytest.CaptureFixture[str],
    options: tuple[str, ...],
    code: int,
    said: str,
) -> None:
    assert run("build", bundle, "-o", tmp_path / "out", *RTX, *options) == code
    assert said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_backend_is_named_and_never_another(
    bundle: Path, tmp_path: Path, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("build", bundle, "-o", tmp_path / "out") == 2
    assert run("build", bundle, "-o", tmp_path / "out", "--backend", "openvino") == 2
    capsys.readouterr()
    assert run("build", bundle, "-o", tmp_path / "out", "--backend", "tensorrt") == 7
    assert "the package tensorrt is not installed" in capsys.readouterr().err


def test_too_little_memory_is_told_before_the_builder_starts(
    bundle: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("guardbake_tensorrt.memory.available_memory", lambda: 200_000_000)
    monkeypatch.setattr("guardbake_tensorrt.build.check_graph", None)
    assert run("build", bundle, "-o", tmp_path / "out", *RTX) == 8
    assert list(tmp_path.iterdir()) == []


def test_a_source_is_never_written(
    bundle: Path, altered: Path, tmp_path: Path, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    for place in (altered / "engines", altered):
        assert run("build", altered, "-o", place, *RTX) == 2
    assert run("build", tmp_path / "none", "-o", tmp_path / "out", *RTX) == 2
    names = sorted(path.name for path in bundle.iterdir())
    assert sorted(path.name for path in altered.iterdir()) == names


def test_a_decoder_without_a_guard_isbuilt_only_if_that_is_said(
    plain: Path, tmp_path: Path, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ("build", plain, "-o", tmp_path / "out", *RTX, "--gpu", "sm89")
    assert run(*command) == 2
    assert "guardbake apply" in capsys.readouterr().err
    assert run(*command, "--unguarded") == 0
    assert EngineRecord.from_json((tmp_path / "out/decoder.engine.json").read_text()).guard == ()


def test_a_lone_graph_needs_its_pack(
    guarded: Any, tmp_path: Path, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    graph = Path(shutil.copyfile(guarded.path, tmp_path / "model.onnx"))
    shutil.copyfile(guarded.path.with_name(f"{DECODER}.data"), tmp_path / f"{DECODER}.data")
    command = ("build", graph, "-o", tmp_path / "out", *RTX, "--gpu", "sm89")
    assert run(*command) == 2
    assert "--guard" in capsys.readouterr().err
    save_guard(guarded.spec, tmp_path / "pack")
    assert run(*command, "--guard", tmp_path / "pack") == 0
    assert verify_engine_folder(tmp_path / "out").engines[0].guard == guarded.spec.digest


def test_the_printed_command_is_about_the_graph_that_would_be_compiled(
    bundle: Path, guarded: Any, tmp_path: Path, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    options = ("--print-command", "--gpu", "rtx-40", "--gpu", "rtx-50", "--batch", "2")
    assert run("build", bundle, "-o", out, *RTX, *options) == 0
    decoder, embedding, vision, note = capsys.readouterr().out.splitlines()
    assert decoder.startswith("tensorrt_rtx --onnx=decoder.onnx --saveEngine=decoder.engine ")
    assert " --noTF32 --computeCapabilities=89,120 --profile=0 --minShapes=" in decoder
    assert "inputs_embeds:2x4x16,attention_mask:2x4," in decoder.split("--optShapes=")[1]
    assert "inputs_embeds:2x4x16,attention_mask:2x8," in decoder.split("--optShapes=")[2]
    assert "inputs_embeds:2x1x16,attention_mask:2x17," in decoder.split("--maxShapes=")[3]
    assert "--maxShapes=input_ids:2x8" in embedding
    assert "--profile" not in vision
    assert "STRICT_NANS" in note
    nodes = list(read_graph(out / DECODER).graph)
    assert any("TRT_decomposable" in node.attributes for node in nodes)
    assert set(guarded.nodes) <= {node.name for node in nodes}
    assert (out / f"{DECODER}.data").stat().st_nlink == 1
    assert list(out.glob("*.engine")) == []


def _edit(model: ir.Model) -> ir.Node:
    return next(n for n in model.graph if n.domain == "guardbake" and str(n.name).endswith("edit"))


def _forget(model: ir.Model) -> None:
    """The edit's body becomes the identity: what constant folding leaves of alpha = 0."""
    function = model.functions[_edit(model).op_identifier()]
    same = ir.node("Identity", [function.inputs[0]], name="same")
    same.outputs[0].name = "same"
    function.append(same)
    function.outputs[0] = same.outputs[0]


def _bypass(model: ir.Model) -> None:
    edit = _edit(model)
    for use in list(edit.outputs[0].uses()):
        use.node.replace_input_with(use.idx, edit.inputs[0])


def _relabel(model: ir.Model) -> None:
    model.metadata_props["guardbake.guard"] = "0" * 64


@pytest.mark.parametrize("plant", [_forget, _bypass, _relabel], ids=lambda plant: plant.__name__)
def test_a_guard_that_is_not_whole_is_notbuilt(
    altered: Path,
    guarded: Any,
    tmp_path: Path,
    run: Run,
    plant: Callable[[ir.Model], None],
) -> None:
    change_decoder(altered, guarded.spec, plant)
    assert run("build", altered, "-o", tmp_path / "out", *RTX) == 6
    assert not (tmp_path / "out").exists()


def test_a_decoder_in_two_branches_is_not_built(
    tmp_path: Path, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    info, ends = helper.make_tensor_value_info, []
    for name in ("first", "later"):
        inner = helper.make_node("Neg", ["inputs_embeds"], [name])
        output = info(name, TensorProto.FLOAT, [1, 2])
        ends.append(helper.make_graph([inner], name, [], [output]))
    either = helper.make_node(
        "If", ["use_cache_branch"], ["logits"], then_branch=ends[0], else_branch=ends[1]
    )
    inputs = [
        info("use_cache_branch", TensorProto.BOOL, []),
        info("inputs_embeds", TensorProto.FLOAT, [1, 2]),
    ]
    logits = info("logits", TensorProto.FLOAT, [1, 2])
    graph = helper.make_graph([either], "merged", inputs, [logits])
    onnx.save_model(helper.make_model(graph), tmp_path / "merged.onnx")
    command = ("build", tmp_path / "merged.onnx", "-o", tmp_path / "out", *RTX)
    assert run(*command, "--unguarded") == 3
    assert "branch of an If" in capsys.readouterr().err


def test_a_folded_guard_has_nothing_to_prove(
    altered: Path, guarded: Any, tmp_path: Path, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    (altered / "manifest.json").unlink()
    model = ir.load(altered / DECODER)
    model.metadata_props["guardbake.fold"] = guarded.spec.digest
    ir.save(model, altered / DECODER)
    assert run("build", altered, "-o", tmp_path / "out", *RTX) == 3
    assert "without --fold" in capsys.readouterr().err
