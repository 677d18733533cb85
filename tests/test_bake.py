"""The tiny VLM through the whole chain, by the command line as a user types it.

What a bake refuses is in test_bake_refusals.py.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import yaml
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from guardbake.artifact import load_guard, save_guard
from guardbake.spec import tensors
from guardbake.vlm.catalog import models_root

from tests.bakes import TINY, Baked, guardbake

Run = Callable[..., int]
ROOT = Path(__file__).parent.parent


@pytest.fixture
def copy(baked: Baked, tmp_path: Path) -> Path:
    """A bundle of the test's own, to harm."""
    return Path(shutil.copytree(baked.bundle, tmp_path / "bundle"))


def _certificate(bundle: Path) -> dict[str, object]:
    value = json.loads((bundle / "certificate.json").read_text())
    assert isinstance(value, dict)
    return value


# ---- a bake that goes well


def test_the_certificate_passes_at_the_noise_floor(baked: Baked) -> None:
    content = _certificate(baked.bundle)
    assert content["verdict"] == "pass"
    assert all(gate["status"] == "pass" for gate in content["gates"])  # type: ignore[attr-defined]
    parity = content["figures"]["parity"]  # type: ignore[index]
    worst = {row["quantity"]: row["worst"] for row in parity["comparisons"]}
    assert worst["logits, prefill"] <= 1e-4
    assert worst["logits, decode"] <= 1e-4
    assert worst["greedy tokens that differ"] == 0
    assert worst["gate decisions outside the band"] == 0
    assert parity["decisions"] > 0


def test_the_last_line_is_the_verdict(baked: Baked) -> None:
    """Of a bake in a process that could not make a socket, see offline.py."""
    assert baked.output.rstrip().splitlines()[-1].startswith("verdict: pass")


def test_the_engine_was_compiled_and_never_ran(baked: Baked) -> None:
    record = json.loads((baked.bundle / "decoder.engine.json").read_text())
    assert record["status"] == "compiled"
    assert record["capabilities"] == ["SM89", "SM120"]
    spec = load_guard(baked.bundle / "guard.safetensors")
    nodes = {entry["node"] for entry in record["guard"]}
    assert any(str(edit.site) in node for edit in spec.edits for node in nodes)
    assert all(entry["layers"] for entry in record["guard"])


def test_a_second_bake_finds_everything_done_and_gives_the_same_bytes(
    baked: Baked, tmp_path: Path
) -> None:
    build = tmp_path / "build"
    build.mkdir()
    shutil.copytree(baked.bundle.parent / ".guardbake", build / ".guardbake")
    done = guardbake("bake", TINY, "-o", build / "again", "--progress", "json")
    assert done.returncode == 0, done.stderr[-3000:]
    events = [json.loads(line) for line in done.stderr.splitlines() if line.startswith("{")]
    ended = {event["stage"]: event["cached"] for event in events if event["event"] == "end"}
    assert ended.pop("publish") is False
    assert ended
    assert all(ended.values()), ended
    for path in sorted(p for p in baked.bundle.rglob("*") if p.is_file()):
        name = path.relative_to(baked.bundle)
        assert (build / "again" / name).read_bytes() == path.read_bytes(), name


def test_verify_and_parity_and_inspect_and_doctor_pass(
    run: Run, baked: Baked, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("verify", baked.bundle, "--full") == 0
    assert run("parity", baked.bundle) == 0
    assert run("doctor") == 0
    capsys.readouterr()
    assert run("inspect", baked.bundle, "--json") == 0
    digest = load_guard(baked.bundle / "guard.safetensors").digest
    assert json.loads(capsys.readouterr().out)["digest"] == digest


def test_harmful_prompts_are_not_in_the_bundle_as_text(baked: Baked) -> None:
    prompts = (models_root() / "tiny-prompts" / "harmful_test.txt").read_text().splitlines()
    for name in ("certificate.json", "CERTIFICATE.md", "manifest.json", "recipe.json"):
        text = (baked.bundle / name).read_text()
        assert not [p for p in prompts if p and not p.startswith("#") and p in text], name


def test_diff_of_bundles_tells_figures_and_verdict(
    run: Run, baked: Baked, copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("diff", baked.bundle, copy, "--check") == 0
    content = _certificate(copy)
    content["verdict"] = "fail"
    content["figures"]["behaviour"]["attack_ratio"]["value"] = 0.5  # type: ignore[index]
    (copy / "certificate.json").write_text(json.dumps(content))
    capsys.readouterr()
    assert run("diff", baked.bundle, copy) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[0] == "verdict: pass -> fail"
    assert [line for line in told if line.startswith("attack_ratio value: ")]
    (copy / "certificate.json").write_text("{}")
    assert run("diff", baked.bundle, copy) == 9


# ---- for others' pipelines


def action_steps() -> dict[str, str]:
    """The shell scripts of the composite action, by the name of their step."""
    action = yaml.safe_load((ROOT / "action.yml").read_text())
    return {step["name"]: step["run"] for step in action["runs"]["steps"]}


@pytest.mark.parametrize("step", ["Verify", "Parity", "Diff"])
def test_a_step_of_the_action_passes_a_bundle_and_stops_an_altered_one(
    step: str, baked: Baked, copy: Path, tmp_path: Path
) -> None:
    command = tmp_path / "guardbake"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m guardbake "$@"\n')
    command.chmod(0o755)
    paths = os.pathsep.join([str(tmp_path), os.environ["PATH"]])
    told = {"PATH": paths, "FULL": "true", "ACCEPTED": str(baked.bundle), "BUNDLE": str(copy)}

    def run_step() -> int:
        script = ["bash", "-e", "-o", "pipefail", "-c", action_steps()[step]]
        return subprocess.run(script, env=os.environ | told, check=False).returncode

    assert run_step() == 0
    _flip(copy / "decoder.onnx")
    _relabel(copy)
    assert run_step() == {"Verify": 6, "Parity": 4, "Diff": 6}[step]


def _relabel(bundle: Path) -> None:
    """Another method in the certificate: what a reviewer has not seen."""
    content = _certificate(bundle)
    content["verdict"] = "unseen"
    (bundle / "certificate.json").write_text(json.dumps(content))


def test_the_hooks_are_commands_that_there_are(run: Run, baked: Baked) -> None:
    for hook in yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text()):
        program, command = hook["entry"].split()
        assert program == "guardbake"
        assert run(command, baked.bundle) == 0


# ---- planted faults


def _flip(decoder: Path) -> None:
    """Negate one row of the first edit's low-rank arrays, in the graph file itself."""
    model = ir.load(decoder)
    for name, value in model.graph.initializers.items():
        if name.endswith(("/basis", "/push")):
            array = value.const_value.numpy().copy()
            row = int(np.abs(array).reshape(len(array), -1).max(axis=1).argmax())
            array[row] *= -1
            value.const_value = ir.tensor(array, name=name)
            break
    else:
        pytest.fail("no basis and no push in the graph")
    ir.save(model, decoder)


def test_a_flipped_basis_row_fails_parity_with_4_and_verify_with_6(run: Run, copy: Path) -> None:
    _flip(copy / "decoder.onnx")
    assert run("parity", copy) == 4
    assert run("verify", copy) == 6


def test_the_unguarded_graph_in_the_bundle_is_found(run: Run, baked: Baked, copy: Path) -> None:
    shutil.copyfile(baked.unguarded / "decoder.onnx", copy / "decoder.onnx")
    assert run("parity", copy) == 4
    assert run("verify", copy) == 6


def test_an_altered_guard_pack_is_refused(run: Run, copy: Path) -> None:
    path = copy / "guard.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 0x80]))  # the sign of the last number
    assert run("inspect", path) == 6
    assert run("verify", copy) == 6


def test_a_missing_bundle_is_a_usage_error(run: Run, tmp_path: Path) -> None:
    assert run("verify", tmp_path / "absent") == 2


def test_a_guard_of_another_boundary_is_refused(run: Run, baked: Baked, tmp_path: Path) -> None:
    """The same numbers under another boundary are another guard: the digest says so."""
    path = tmp_path / "guard.safetensors"
    spec = load_guard(baked.bundle / "guard.safetensors")
    save_guard(spec, path)
    arrays = load_file(path)
    assert set(arrays) == set(tensors(spec))
    with safe_open(str(path), framework="np") as pack:
        meta = pack.metadata()
    assert "residual" in meta["guardbake"]
    meta["guardbake"] = meta["guardbake"].replace("residual", "ffn_output")
    moved = {name.replace("residual", "ffn_output"): array for name, array in arrays.items()}
    save_file(moved, path, meta)
    assert run("inspect", path) == 6


# ---- apply


def test_apply_needs_no_torch_and_shares_the_weights(baked: Baked, tmp_path: Path) -> None:
    source = Path(shutil.copytree(baked.unguarded, tmp_path / "unguarded"))
    out = tmp_path / "guarded"
    script = (
        "import sys\n"
        "for name in ('torch', 'transformers', 'onnxruntime'): sys.modules[name] = None\n"
        "from guardbake.cli import main\n"
        f"sys.argv = ['guardbake', 'apply', {str(source)!r}, '--guard', "
        f"{str(baked.bundle / 'guard.safetensors')!r}, '-o', {str(out)!r}, '--no-self-check']\n"
        "main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert (out / "decoder.onnx").read_bytes() == (baked.bundle / "decoder.onnx").read_bytes()
    assert (out / "decoder.onnx.data").samefile(source / "decoder.onnx.data")


def test_export_and_apply_give_the_bytes_that_the_bake_gives(
    run: Run, baked: Baked, tmp_path: Path
) -> None:
    source, out = baked.bundle.parent / "exported", tmp_path / "guarded"
    assert run("export", models_root() / "tiny-llava", "-o", source) == 0
    assert sorted(p.name for p in source.iterdir()) == sorted(
        p.name for p in baked.unguarded.iterdir()
    )
    for path in baked.unguarded.iterdir():
        assert (source / path.name).read_bytes() == path.read_bytes(), path.name
    guard = baked.bundle / "guard.safetensors"
    assert run("apply", source, "--guard", guard, "-o", out, "--weights", "copy") == 0
    assert (out / "decoder.onnx").read_bytes() == (baked.bundle / "decoder.onnx").read_bytes()
    captures = list((baked.bundle.parent / ".guardbake").glob("capture-*"))
    assert len(captures) == 1  # what the bake captured was used again


def test_apply_refuses_and_leaves_nothing(run: Run, baked: Baked, tmp_path: Path) -> None:
    guard = baked.bundle / "guard.safetensors"
    source = Path(shutil.copytree(baked.unguarded, tmp_path / "unguarded"))
    out = tmp_path / "out"
    described = json.loads((source / "model.json").read_text())

    def refused(code: int) -> None:
        assert run("apply", source, "--guard", guard, "-o", out, "--weights", "copy") == code
        assert not out.exists()
        assert not list(tmp_path.glob(".*"))

    (source / "model.json").write_text(json.dumps(described | {"model_digest": "0" * 64}))
    refused(6)  # fitted for another model
    (source / "model.json").write_text(json.dumps(described))
    model = ir.load(source / "decoder.onnx")
    spec = load_guard(guard)
    edited = next(
        v for n in model.graph for v in n.outputs if v.name == spec.edits[0].site.onnx_value
    )
    maker = edited.producer()
    edited.name = maker.name = "nameless"
    maker.op_type = "Mul"  # no projection, so that the residual stream does not show it either
    for node in model.graph:
        node.metadata_props.clear()
    ir.save(model, source / "decoder.onnx")
    refused(3)  # the site is missing
    layer = spec.edits[0].site.layer
    other = next(v for n in model.graph for v in n.outputs if v is not edited and v.uses())
    edited.name = f"/model/layers.{layer}/mlp/down_proj/MatMul_output_0"
    other.name = f"/model/layers.{layer}/mlp/fc2/MatMul_output_0"
    ir.save(model, source / "decoder.onnx")
    refused(3)  # the site is there twice
    other.name = edited.name
    (source / "decoder.onnx").write_bytes(ir.to_proto(model).SerializeToString())
    refused(9)  # two values of one name are no graph
    (source / "decoder.onnx").write_bytes(b"no graph")
    refused(9)
    (source / "decoder.onnx").unlink()
    refused(2)


def test_apply_onto_a_guarded_graph_is_refused(run: Run, baked: Baked, tmp_path: Path) -> None:
    guard = baked.bundle / "guard.safetensors"
    out = tmp_path / "out"
    assert run("apply", baked.bundle, "--guard", guard, "-o", out, "--weights", "copy") == 3
    assert run("apply", baked.unguarded, "--guard", guard, "-o", tmp_path) == 2


# ---- what is measured of it


def test_the_bench_runs_on_a_bundle(baked: Baked, tmp_path: Path) -> None:
    bench, results = ROOT / "tools" / "bench" / "run.py", tmp_path / "results.json"
    checkpoint = models_root() / "tiny-llava"
    options = ("--rounds", "1", "--threads", "1", "--checkpoint", checkpoint, "--json", results)
    subprocess.run([sys.executable, bench, baked.bundle, *options], check=True, capture_output=True)
    found = json.loads(results.read_text())
    for case in ("prefill", "decode"):
        assert found["overhead"][case]["guarded / unguarded"] > 0
        assert 0 < found["profile"][case]["guard share of kernel time"] < 1
        assert 0 < found["profile"][case]["guard kernels"] < found["profile"][case]["kernels"]
    assert found["speed"]["onnx / torch"] > 0
