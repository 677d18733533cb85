"""`guardbake revalidate`: a guard fitted on the float model, on its quantised decoder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

from guardbake.artifact import load_guard, save_guard
from guardbake.bundle.manifest import GUARD
from guardbake.plugins import find_session
from guardbake.recipe import load_recipe
from guardbake.samples import SENSED
from guardbake.spec import GuardSpec
from guardbake.steps.revalidate import Calibration, revalidate
from guardbake.steps.split import split_samples
from guardbake.vlm.load import load_vlm
from guardbake.vlm.requests import Typography

from tests.bakes import TINY, Baked

Run = Callable[..., int]


def requantised(source: Path, target: Path, bits: int) -> Path:
    """The folder with its decoder's matrices as MatMulNBits, in blocks of 16 rows."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("decoder.onnx*"))
    quantiser = MatMulNBitsQuantizer(
        onnx.load(source / "decoder.onnx"), bits=bits, block_size=16, is_symmetric=True
    )
    quantiser.process()
    quantiser.model.save_model_to_file(str(target / "decoder.onnx"), True)
    return target


@pytest.fixture(scope="module")
def int4(baked: Baked, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return requantised(baked.unguarded, tmp_path_factory.mktemp("int4") / "model", 4)


def test_thresholds_are_set_on_the_quantised_graph(
    baked: Baked, int4: Path, run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, pack = tmp_path / "out", baked.bundle / GUARD
    assert run("revalidate", int4, "--guard", pack, "--recipe", TINY, "-o", out) == 0
    old, new = load_guard(pack), load_guard(out / GUARD)
    applied = json.loads((out / "applied.json").read_text())
    said = applied["revalidation"]
    assert said["guard"] == old.digest
    assert new.provenance["revalidated"] == {
        key: said[key] for key in ("guard", "graph", "samples", "rate")
    }
    (gate,) = said["gates"]
    assert gate["thresholds"] == {
        "before": list(old.sensors[0].thresholds),
        "after": list(new.sensors[0].thresholds),
    }
    assert gate["thresholds"]["before"] != gate["thresholds"]["after"]
    assert set(gate["forms"]) == set(SENSED)
    for form in gate["forms"].values():
        assert form["shift"]["largest"] > 0.1  # four bits are seen, in harmless deviations
        assert form["harmless_open"]["after"] <= said["rate"]
        assert form["harmful_open"]["reference"] - form["harmful_open"]["after"] <= said["loss"]
    assert applied["decoders"]["decoder.onnx"]["self_check"]["agreements"]
    assert run("verify", out, "--unguarded", int4) == 0
    assert f"guard {new.digest[:12]}, for onnxruntime" in capsys.readouterr().out


def calibration(checkpoint: Path, each: int) -> Calibration:
    """`each` prompts of either label and form out of the tiny recipe's own."""
    vlm, recipe = load_vlm(str(checkpoint)), load_recipe(TINY)
    section = recipe.samples.typography
    draw = Typography(section.columns, section.rows, section.instruction)
    splits = split_samples(recipe, TINY.parent, draw, vlm.processor.tokenizer)
    samples = splits.samples("calibrate", SENSED)
    few = [
        sample
        for form in SENSED
        for label in ("harmful", "harmless")
        for sample in [s for s in samples if (s.form, s.label) == (form, label)][:each]
    ]
    return Calibration(vlm, draw, 8, few, "0" * 64, 0.2, 1.0)


def test_the_float_graph_has_the_float_models_scores(baked: Baked) -> None:
    """What is read from a graph is what the sensor was fitted on: nothing moves."""
    given = calibration(TINY.parent / "tiny-llava", 4)
    said: list[tuple[str, int, int]] = []

    def advance(what: str, done: int, total: int) -> None:
        said.append((what, done, total))

    _, record = revalidate(
        baked.unguarded, baked.bundle / GUARD, given, find_session("onnx"), advance
    )
    (gate,) = record["gates"]
    for form in gate["forms"].values():
        # float32 on both sides, of scores of about 10 in sums of 128 terms
        assert form["shift"]["largest"] < 1e-4
    assert {what for what, _, _ in said} == {"reading the float model", "reading the graph"}
    assert said[-1] == ("reading the graph", 32, 32)


def test_a_decoder_in_which_the_sensor_is_blind_is_refused(
    baked: Baked, run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken, out = tmp_path / "broken", tmp_path / "out"
    shutil.copytree(baked.unguarded, broken)
    model = onnx.load(broken / "decoder.onnx")
    for tensor in model.graph.initializer:
        if tensor.name.startswith("model.layers.") and len(tensor.dims) == 2:
            zeros = np.zeros(tuple(tensor.dims), np.float32)
            tensor.CopyFrom(onnx.numpy_helper.from_array(zeros, tensor.name))
    (broken / "decoder.onnx.data").unlink()
    onnx.save(model, broken / "decoder.onnx")
    pack = baked.bundle / GUARD
    assert run("revalidate", broken, "--guard", pack, "--recipe", TINY, "-o", out) == 5
    assert "on the model it was fitted on" in capsys.readouterr().err
    assert not out.exists()


def test_what_cannot_be_set_anew_is_refused(
    baked: Baked, run: Run, tmp_path: Path, guard: Callable[..., GuardSpec]
) -> None:
    out, pack = tmp_path / "out", tmp_path / "guard.safetensors"

    def refused(source: Path, pack: Path) -> int:
        return run("revalidate", source, "--guard", pack, "--recipe", TINY, "-o", out)

    save_guard(guard("sequence"), pack)
    assert refused(baked.unguarded, pack) == 6  # fitted for another model
    twice = tmp_path / "twice"
    shutil.copytree(baked.unguarded, twice)
    shutil.copy(twice / "decoder.onnx", twice / "second.onnx")
    assert refused(twice, baked.bundle / GUARD) == 3
    assert not out.exists()
    out.mkdir()
    assert refused(baked.unguarded, baked.bundle / GUARD) == 2
