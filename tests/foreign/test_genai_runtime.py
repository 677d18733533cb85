"""A guarded folder in onnxruntime-genai itself: an image, its own loop, against PyTorch."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from guardbake.artifact import save_guard
from guardbake.site import Site
from guardbake.spec import GuardSpec
from guardbake.vlm.load import Vlm, load_vlm
from guardbake.vlm.runner import TorchRunner

from tests.foreign.conftest import LAYERS, WIDTH
from tests.foreign.genai_loop import TOKENS, Said, answer, ask, draw, require_alike

HERE = Path(__file__).parent
FOLDER = HERE / "folders" / "mobius-multimodal"
PROMPT = "<|vision_start|><|image_pad|><|vision_end|>what is drawn here"
# float32 on both sides, whose kernels sum in other orders: 16 columns, scores about one
ROUNDING = 1e-5


@pytest.fixture(scope="module")
def vlm() -> Vlm:
    return load_vlm(str(HERE / "qwen2_5_vl"))


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    return draw((56, 84), tmp_path / "picture.png")


Guarded = Callable[..., tuple[GuardSpec, Path]]


@pytest.fixture
def guarded(guard_folder: Guarded, vlm: Vlm) -> Guarded:
    """A guard and the folder it was applied to."""

    def make(threshold: float, pools: bool) -> tuple[GuardSpec, Path]:
        place = {"width": WIDTH, "layers": LAYERS, "sensor": Site(0, "residual"), "edits": (1,)}
        changes = {"strength": 2.0, "threshold": threshold, "pools": pools} | place
        return guard_folder(vlm, FOLDER, "sequence", **changes)

    return make


@pytest.mark.parametrize("pools", [False, True])
def test_genai_carries_a_latched_guard(
    guarded: Guarded, vlm: Vlm, picture: Path, pools: bool
) -> None:
    answers, middle = {}, {}
    for threshold in (-5.0, 5.0):
        spec, folder = guarded(threshold, pools)
        said, _ = ask(folder, PROMPT, [picture], vlm)
        require_alike(vlm, spec, said, ROUNDING)
        answers[threshold] = said.tokens
        assert set(said.opened) == {threshold < 0}
        middle[threshold] = np.array(said.scores) + threshold
    assert answers[-5.0] != answers[5.0]
    assert answers[5.0] == TorchRunner(vlm, None).run(said.batch, TOKENS).tokens[0].tolist()
    # decided by the prompt, though a token of the answer by itself says the opposite
    first = middle[5.0][0]
    for other in (middle[-5.0][1:].min(), middle[5.0][1:].max()):
        spec, folder = guarded(float((first + other) / 2), pools)
        said, _ = ask(folder, PROMPT, [picture], vlm)
        require_alike(vlm, spec, said, ROUNDING)
        assert set(said.opened) == {bool(other < first)}
        assert min(said.scores) < 0 < max(said.scores)


def test_a_second_turn_is_decided_anew(guarded: Guarded, vlm: Vlm, picture: Path) -> None:
    turn = np.array([9, 10, 11], np.int32)

    def both_turns(threshold: float) -> tuple[Said, Said]:
        _, folder = guarded(threshold, False)
        first, generator = ask(folder, PROMPT, [picture], vlm)
        generator.append_tokens(turn)
        return first, answer(generator, first.batch)

    first, second = both_turns(5.0)
    assert not any(first.opened + second.opened)
    prompt, later = first.scores[0] + 5, second.scores[0] + 5
    assert prompt < later
    first, second = both_turns((prompt + later) / 2)
    assert not any(first.opened)
    assert all(second.opened)


def test_a_guard_that_cannot_be_carried_is_refused(
    run: Callable[..., int],
    foreign_guard: Callable[..., GuardSpec],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = Path(shutil.copytree(FOLDER, tmp_path / "folder"))
    pack, path = tmp_path / "guard.safetensors", folder / "genai_config.json"
    written = json.loads(path.read_text())

    def refused(code: int, said: str, kind: str = "steer", **changes: Any) -> None:
        config = json.loads(json.dumps(written))
        for place, value in changes.items():
            section, _, key = place.partition("__")
            config[section][key] = value
        path.write_text(json.dumps(config))
        save_guard(foreign_guard("sequence", kind, pools=True), pack)
        assert run("apply", folder, "--guard", pack, "-o", tmp_path / "out") == code
        assert said in capsys.readouterr().err
        assert not (tmp_path / "out").exists()

    refused(3, "search.chunk_size", search__chunk_size=64)
    refused(3, "image_token_id", model__image_token_id=None)
    refused(3, "guard_text_1", kind="replace")
    decoder = written["model"]["decoder"]
    refused(9, "num_hidden_layers", model__decoder=decoder | {"num_hidden_layers": "2"})
    refused(9, "past_key_names", model__decoder=decoder | {"inputs": {"past_key_names": "past"}})


def test_a_carried_state_that_was_altered_is_found(
    run: Callable[..., int], guarded: Guarded
) -> None:
    """Each alters one thing of what lies around the guard; the guard's own nodes are untouched."""
    _, out = guarded(0.0, True)
    whole = (out / "decoder" / "model.onnx").read_bytes()

    def found(change: Callable[[ir.Graph], object]) -> None:
        (out / "decoder" / "model.onnx").write_bytes(whole)
        model = ir.load(out / "decoder" / "model.onnx")
        change(model.graph)
        ir.save(model, out / "decoder" / "model.onnx")
        assert run("verify", out, "--unguarded", FOLDER) == 6

    def node(graph: ir.Graph, name: str) -> ir.Node:
        return next(node for node in graph if node.name == f"guardbake/carrier/{name}")

    def zero(graph: ir.Graph, name: str, number: int) -> None:
        value = graph.initializers[f"guardbake/carrier/{name}"]
        value.const_value = ir.tensor(np.array([number], np.int64), name=value.name)

    found(lambda graph: zero(graph, "conv_state/zero", 1))  # every prompt closed
    found(lambda graph: zero(graph, "one", 0))  # every token a turn
    found(lambda graph: zero(graph, "image_token", 1))
    found(lambda graph: node(graph, "guard_state").replace_input_with(2, graph.inputs[0]))
    found(lambda graph: node(graph, "guard_state_out").replace_input_with(0, graph.inputs[0]))
