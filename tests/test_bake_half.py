"""A bundle whose graphs compute in float16: certified, checked again, and a fault in it is seen."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from guardbake.bundle.manifest import CERTIFICATE, DECODER
from guardbake.errors import RecipeError
from guardbake.passes.locate import locate
from guardbake.recipe import load_recipe
from guardbake.recipe_engine import Half
from guardbake.site import Site
from guardbake.vlm.catalog import models_root

from tests.bakes import TINY, Baked, guardbake
from tests.mutation.faults_in_graph import PRESENCE, renumber, strip_edit

Run = Callable[..., int]
HALF = '\n[export]\nnumber = "float16"\n'
NOISE = TINY.read_text().split("[parity.noise]")[1].split("\n\n")[0]


def _damp(model: ir.Model) -> None:
    """A fault of the model, not of its guard: a twentieth of an earlier FFN output is gone."""
    site = Site(1, "ffn_output")
    value = locate(model.graph, [site])[site].value
    node, users = value.producer(), list(value.uses())
    assert node is not None
    factor = ir.val("factor", const_value=ir.tensor(np.float16(0.95), name="factor"))
    model.graph.register_initializer(factor)
    less = ir.node("Mul", [value, factor], name="less")
    less.outputs[0].dtype, less.outputs[0].shape = value.dtype, value.shape
    model.graph.insert_after(node, less)
    for use in users:
        use.node.replace_input_with(use.idx, less.outputs[0])


def _recipe(folder: Path, *changes: tuple[str, str]) -> Path:
    text = TINY.read_text(encoding="utf-8") + HALF
    for old, new in changes:
        assert old in text, old
        text = text.replace(old, new)
    path = folder / "half.toml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def half(baked: Baked, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same guard in another bundle: the stages of the float32 bake are taken up again."""
    folder = tmp_path_factory.mktemp("half")
    for name in ("tiny-llava", "tiny-prompts"):
        shutil.copytree(models_root() / name, folder / name)
    shutil.copytree(baked.bundle.parent / ".guardbake", folder / "build" / ".guardbake")
    out = folder / "build" / "half"
    done = guardbake("bake", _recipe(folder), "-o", out)
    assert done.returncode == 0, done.stderr[-3000:]
    return out


def test_its_certificate_says_where_each_budget_comes_from(half: Path, run: Run) -> None:
    content = json.loads((half / CERTIFICATE).read_text())
    assert content["verdict"] == "pass"
    rows = content["figures"]["parity"]["comparisons"]
    said = {row["gate"]: row["source"] for row in rows}
    for gate in ("logits", "kl", "score", "ffn output", "cosine", "norm ratio", "canary"):
        assert "that float16 does to the reference itself; another float32 summation" in said[gate]
    assert said["law"].startswith("all that float32 sums explain")  # the guard's own arithmetic
    worst = {row["gate"]: row["worst"] for row in rows}
    assert worst["logits"] > 1e-4  # of float32's budget
    graph = ir.load(half / DECODER).graph
    caches = {v.dtype for v in graph.inputs if str(v.name).startswith("past_key_values.")}
    assert caches == {ir.DataType.FLOAT16}
    record = json.loads((half / "decoder.engine.json").read_text())
    assert ["trunk", "float16"] in record["settings"]
    assert run("verify", half) == 0
    assert run("parity", half) == 0


@pytest.mark.parametrize(
    "plant",
    [
        renumber("Edit", "strength", lambda a: a * np.float32(0.9)),
        renumber("Edit", "push", lambda a: a * np.float32(1.01)),
        PRESENCE["threshold at infinity"],
        strip_edit,
        _damp,
    ],
    ids=["alpha x 0.9", "push x 1.01", "threshold at infinity", "no edit", "FFN x 0.95"],
)
def test_a_fault_in_its_graph_is_seen(
    half: Path, tmp_path: Path, run: Run, plant: Callable[[ir.Model], object]
) -> None:
    bundle = Path(shutil.copytree(half, tmp_path / "bundle"))
    model = ir.load(bundle / DECODER)
    plant(model)
    ir.save(model, bundle / DECODER)
    assert run("parity", bundle) == 4


@pytest.mark.parametrize(
    ("changes", "halves"),
    [
        ((), ["float16"]),
        ((('number = "float16"', 'number = "float32"'),), []),
        ((('backend = "rtx"', 'backend = "rtx"\nnumber = "float16"'),), ["float16"]),
        (
            (
                (HALF, ""),
                ('backend = "rtx"', 'backend = "rtx"\nnumber = "bfloat16"'),
            ),
            ["bfloat16"],
        ),
    ],
)
def test_what_has_to_be_measured_follows_from_the_recipe(
    tmp_path: Path, changes: tuple[tuple[str, str], ...], halves: list[Half]
) -> None:
    assert load_recipe(_recipe(tmp_path, *changes)).halves == halves


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ((f"[parity.noise]{NOISE}", ""), "parity.noise must say how many times"),
        (('backend = "rtx"', 'backend = "rtx"\nnumber = "bfloat16"'), "engine.number must be"),
        (('number = "float16"', 'number = "bfloat16"'), "export.number"),
    ],
)
def test_a_precision_that_makes_no_sense_is_refused(
    tmp_path: Path, change: tuple[str, str], said: str
) -> None:
    with pytest.raises(RecipeError, match=said):
        load_recipe(_recipe(tmp_path, change))
