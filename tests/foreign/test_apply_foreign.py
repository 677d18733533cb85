"""`guardbake apply` on every exporter's folder: guarded, checked, verified again."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest

from guardbake.artifact import save_guard
from guardbake.passes.functions import DOMAIN
from guardbake.spec import GuardSpec
from guardbake.steps.apply import APPLIED

Run = Callable[..., int]
Pack = Callable[..., Path]
NAMES = [
    "genai-fp32",
    "genai-fp16",
    "genai-int8",
    "genai-int4",
    "mobius",
    "mobius-gqa",
    "optimum",
    "optimum-merged",
    "onnxruntime-saved",
    "edgellm",
]
RUNTIMES = {"optimum": "onnxruntime", "onnxruntime-saved": "onnxruntime"}
RUNTIMES |= {"optimum-merged": "transformers.js", "edgellm": "tensorrt-edgellm"}


@pytest.fixture
def pack(foreign_guard: Callable[..., GuardSpec], tmp_path: Path) -> Pack:
    def make(profile: str = "token", kind: str = "care", **changes: object) -> Path:
        path = tmp_path / f"{profile}.safetensors"
        save_guard(foreign_guard(profile, kind, **changes), path)
        return path

    return make


@pytest.fixture
def folder(graph_of: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    """A copy of a folder, for a test to spoil."""

    def copy(name: str) -> Path:
        top = next(path for path in graph_of(name).parents if path.name == name)
        return Path(shutil.copytree(top, tmp_path / name))

    return copy


@pytest.mark.parametrize("name", NAMES)
def test_every_folder_is_guarded_and_checked(
    run: Run, folder: Callable[[str], Path], pack: Pack, tmp_path: Path, name: str
) -> None:
    source, out = folder(name), tmp_path / "out"
    assert run("apply", source, "--guard", pack(), "-o", out) == 0
    record = json.loads((out / APPLIED).read_text())
    assert record["runtime"] == RUNTIMES.get(name, "onnxruntime-genai")
    ((graph, report),) = record["decoders"].items()
    agreements = report["self_check"]["agreements"]
    branches = 2 if name == "optimum-merged" else 1
    nodes = 4 if name == "edgellm" else 5  # reading, sensor, gate, edit; tokens where not packed
    assert len(report["nodes"]) == branches * nodes
    edited = agreements["layers.1.ffn_output while open"]
    assert edited["compared"] > 0
    assert edited["worst"] <= 1
    if name == "edgellm":
        assert report["self_check"]["replaced"] == ["AttentionPlugin"]
        assert agreements["outputs while every gate is closed"]["compared"] == 3  # 1 call
    else:
        assert agreements["outputs while every gate is closed"]["compared"] == 2 * 5  # 2 calls
    assert agreements["score of gate 0"]["difference"] > 0  # float32 against float64
    assert ir.load(out / graph).metadata_props["guardbake.guard"] == record["guard"]
    others = {p.relative_to(source) for p in source.rglob("*") if p.is_file()}
    written = {p.relative_to(out) for p in out.rglob("*") if p.is_file()}
    assert written - others == {Path(APPLIED), Path("guard.safetensors")}
    assert run("verify", out, "--unguarded", source) == 0
    shutil.copyfile(source / graph, out / graph)
    assert run("verify", out, "--unguarded", source) == 6


def test_a_loop_that_feeds_no_state_gets_no_latched_guard(
    run: Run,
    folder: Callable[[str], Path],
    pack: Pack,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source, guard, out = folder("optimum-merged"), pack("sequence"), tmp_path / "out"
    assert run("apply", source, "--guard", guard, "-o", out) == 3
    said = capsys.readouterr().err
    assert "adds the inputs guard_state\n  expected  a guard of profile always or token" in said
    assert not out.exists()
    own = "--runtime", "onnxruntime"
    assert run("apply", source, "--guard", guard, "-o", out, *own) == 0
    assert json.loads((out / APPLIED).read_text())["runtime"] == "onnxruntime"
    assert run("verify", out, "--unguarded", source) == 0


@pytest.mark.parametrize("name", ["genai-fp32", "genai-fp16", "genai-int8", "genai-int4", "mobius"])
def test_genais_loop_carries_the_state_of_a_latched_guard(
    run: Run, folder: Callable[[str], Path], pack: Pack, tmp_path: Path, name: str
) -> None:
    source, guard, out = folder(name), pack("sequence"), tmp_path / "out"
    assert run("apply", source, "--guard", guard, "-o", out) == 0
    ((graph, report),) = json.loads((out / APPLIED).read_text())["decoders"].items()
    assert report["carried_by"] == "past_key_values.2.*"
    agreements = report["self_check"]["agreements"]
    assert agreements["outputs while the loop carries the state"]["compared"] == 3 * 7
    taken = {str(value.name) for value in ir.load(out / graph).graph.inputs}
    added = taken - {str(value.name) for value in ir.load(source / graph).graph.inputs}
    assert added == {f"past_key_values.2.{part}" for part in ("conv_state", "recurrent_state")}
    assert run("verify", out, "--unguarded", source) == 0
    fed = tmp_path / "fed"
    assert run("apply", source, "--guard", guard, "-o", fed, "--runtime", "onnxruntime") == 0
    assert run("verify", fed, "--unguarded", source) == 0


def test_packed_tokens_do_not_tell_where_a_sequence_ends(
    run: Run,
    folder: Callable[[str], Path],
    pack: Pack,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = folder("edgellm")
    assert run("apply", source, "--guard", pack("sequence"), "-o", tmp_path / "out") == 3
    assert "use the profile always or token" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("profile", ["always", "token"])
def test_a_guard_of_packed_tokens_leaves_the_loops_inputs_and_outputs(
    run: Run, folder: Callable[[str], Path], pack: Pack, tmp_path: Path, profile: str
) -> None:
    source, out = folder("edgellm"), tmp_path / "out"
    assert run("apply", source, "--guard", pack(profile), "-o", out) == 0
    before, after = (ir.load(top / "llm" / "model.onnx").graph for top in (source, out))
    for old, new in ((before.inputs, after.inputs), (before.outputs, after.outputs)):
        assert [(v.name, v.dtype, v.shape) for v in old] == [
            (v.name, v.dtype, v.shape) for v in new
        ]


def _never_open(model: ir.Model) -> None:
    """The packed gate's body says no, whatever the score."""
    gate = next(node for node in model.graph if "/gate." in str(node.name))
    body = model.functions[gate.op_identifier()]
    opens = body.outputs[0]
    shut = ir.node("And", [opens, ir.node("Not", [opens]).outputs[0]], name="shut")
    both = shut.inputs[1].producer()  # type: ignore[union-attr]
    assert both is not None
    both.outputs[0].name, both.name = "other", "other"
    opens.name, shut.outputs[0].name = "inner", "open"
    body.extend([both, shut])
    body.outputs[0] = shut.outputs[0]


def _show_the_verdict(model: ir.Model) -> None:
    gate = next(node for node in model.graph if "/gate." in str(node.name))
    model.graph.outputs.append(gate.outputs[0])


@pytest.mark.parametrize("plant", [_never_open, _show_the_verdict], ids=lambda p: p.__name__)
def test_a_packed_guard_that_was_altered_is_refused(
    run: Run,
    folder: Callable[[str], Path],
    pack: Pack,
    tmp_path: Path,
    plant: Callable[[ir.Model], None],
) -> None:
    source, out = folder("edgellm"), tmp_path / "out"
    assert run("apply", source, "--guard", pack(), "-o", out) == 0
    model = ir.load(out / "llm" / "model.onnx")
    plant(model)
    ir.save(model, out / "llm" / "model.onnx")
    assert run("verify", out, "--unguarded", source) == 6


@pytest.mark.parametrize("name", ["edgellm", "genai-fp16"])
def test_a_guard_is_folded_into_anothers_weights(
    run: Run,
    folder: Callable[[str], Path],
    pack: Pack,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
) -> None:
    source, out = folder(name), tmp_path / "out"
    assert run("apply", source, "--guard", pack("token"), "-o", out, "--fold") == 3
    assert "profile token: a gate decides call by call" in capsys.readouterr().err
    guard = pack("always", "care parallel")
    assert run("apply", source, "--guard", guard, "-o", out, "--fold") == 0
    ((graph, report),) = json.loads((out / APPLIED).read_text())["decoders"].items()
    assert list(report["sites"]) == ["layers.1.ffn_output"]
    plain, folded = ir.load(source / graph).graph, ir.load(out / graph).graph
    assert [v.name for v in folded.inputs] == [v.name for v in plain.inputs]
    assert [v.name for v in folded.outputs] == [v.name for v in plain.outputs]
    assert not [node for node in folded if node.domain == DOMAIN]
    assert run("verify", out, "--unguarded", source) == 0
    shutil.copyfile(source / graph, out / graph)
    assert run("verify", out, "--unguarded", source) == 6


@pytest.mark.parametrize("kind", ["care sequential", "project", "replace", "steer", "astra"])
def test_every_kind_of_edit_in_both_branches(
    run: Run, folder: Callable[[str], Path], pack: Pack, tmp_path: Path, kind: str
) -> None:
    """Latched, with a pooling sensor: every input and output that a guard can add."""
    source, out = folder("optimum-merged"), tmp_path / "out"
    guard = pack("sequence", kind, pools=True)
    own = "--runtime", "onnxruntime"
    assert run("apply", source, "--guard", guard, "-o", out, *own) == 0
    (report,) = json.loads((out / APPLIED).read_text())["decoders"].values()
    assert {"memory", "guard_state_out"} <= set(report["self_check"]["agreements"])
    (switch,) = ir.load(out / "onnx" / "decoder_model_merged.onnx").graph
    for branch in ("then_branch", "else_branch"):
        inner = switch.attributes[branch].as_graph()
        assert sum(node.domain == DOMAIN for node in inner) == 5
        assert [v.name for v in inner.outputs] == [v.name for v in switch.outputs]


def test_without_onnxruntime_the_check_is_refused_or_waived_on_record(
    folder: Callable[[str], Path], pack: Pack, tmp_path: Path
) -> None:
    source, guard = folder("genai-fp32"), pack()

    def apply(out: Path, *more: str) -> subprocess.CompletedProcess[str]:
        script = (
            "import sys\n"
            "for name in ('torch', 'transformers', 'onnxruntime'): sys.modules[name] = None\n"
            "from guardbake.cli import main\n"
            f"sys.argv = ['guardbake', 'apply', {str(source)!r}, '--guard', {str(guard)!r},"
            f" '-o', {str(out)!r}, *{list(more)!r}]\n"
            "main()\n"
        )
        command = [sys.executable, "-c", script]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    refused = apply(tmp_path / "refused")
    assert refused.returncode == 7, refused.stderr
    assert "--no-self-check" in refused.stderr
    assert not (tmp_path / "refused").exists()
    waived = apply(tmp_path / "waived", "--no-self-check")
    assert waived.returncode == 0, waived.stderr
    record: Any = json.loads((tmp_path / "waived" / APPLIED).read_text())
    assert record["decoders"]["model.onnx"]["self_check"] == "not run: --no-self-check"
