"""A guarded folder in transformers.js itself: an image, its own loop, against PyTorch."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from guardbake.plugins import Number, Trace
from guardbake.progress import PlainReporter
from guardbake.samples.typography import draw_cells, pieces_of
from guardbake.site import Site
from guardbake.spec import GuardSpec
from guardbake.steps.export import export_checkpoint
from guardbake.vlm.catalog import models_root
from guardbake.vlm.load import Vlm, load_vlm
from guardbake.vlm.runner import TorchRunner
from guardbake.vlm.tokens import collate

SCRIPT = Path(__file__).parent / "transformersjs" / "ask.mjs"
FAMILIES = ["tiny-llava", "tiny-qwen2_5_vl"]
TOKENS = 9
FAR = 30.0  # further than any score
TURN = "how do i make a cake ?"
# float32 on both sides, whose kernels sum in other orders, behind a picture of values up to one:
# scores about ten, seen 1e-6 apart; in float16, whose unit is 2^-11 of a value, 4e-4 apart
PIXEL_ROUNDING, SCORE_ROUNDING, SCORE_ROUNDING_HALF = 1e-6, 1e-5, 2e-3
llava = pytest.mark.parametrize("checkpoint", FAMILIES[:1], indirect=True)
pytestmark = pytest.mark.skipif(
    shutil.which("node") is None, reason="no node, in which transformers.js runs"
)


@dataclass(frozen=True)
class Question:
    """Texts that are fed as one batch, a picture beside the only one, a second turn's tokens."""

    texts: tuple[str, ...]
    image: Path | None = None
    again: tuple[int, ...] | None = None

    def to_json(self) -> dict[str, Any]:
        image = None if self.image is None else str(self.image)
        return {"texts": self.texts, "image": image, "tokens": TOKENS, "again": self.again}


@pytest.fixture(scope="module", params=FAMILIES)
def checkpoint(request: pytest.FixtureRequest) -> Path:
    return models_root() / str(request.param)


@pytest.fixture(scope="module")
def vlm(checkpoint: Path) -> Vlm:
    return load_vlm(str(checkpoint))


@pytest.fixture(scope="module")
def questions(vlm: Vlm, tmp_path_factory: pytest.TempPathFactory) -> tuple[Question, ...]:
    """A drawn request, and two texts of unequal length: as one batch, or, to a Qwen2.5-VL, whose
    loop forgets after the prompt which tokens are padding, one by one."""
    picture = tmp_path_factory.mktemp("picture") / "picture.png"
    draw_cells(pieces_of("make a cake", vlm.processor.tokenizer), 4, 4).save(picture)
    texts = "tell me how to make a good cake for a friend ?", "what is a"
    batches = (texts,) if vlm.family.name == "llava" else tuple((text,) for text in texts)
    drawn = Question(("answer the request in the image .",), picture)
    return drawn, *(Question(batch) for batch in batches)


@pytest.fixture(scope="module")
def exported(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("transformersjs") / "exported"
    return export(checkpoint, folder, "float32")


def export(checkpoint: Path, folder: Path, number: Number) -> Path:
    reporter = PlainReporter(io.StringIO())
    export_checkpoint(str(checkpoint), folder, "stream", number, "transformersjs", reporter)
    return folder


def ask(folder: Path, *questions: Question) -> list[dict[str, Any]]:
    """What ask.mjs answers; `make test` installs what it needs."""
    asked = json.dumps([question.to_json() for question in questions])
    command = ["node", "--no-warnings", str(SCRIPT), str(folder)]  # of node itself
    done = subprocess.run(command, input=asked, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr == ""  # it warns of inputs and files that it does not understand
    answers: list[dict[str, Any]] = json.loads(done.stdout)
    return answers


@pytest.fixture(scope="module")
def unguarded(exported: Path, questions: tuple[Question, ...]) -> list[Any]:
    return [answer["tokens"] for answer in ask(exported, *questions)]


def require_alike(
    vlm: Vlm,
    spec: GuardSpec | None,
    question: Question,
    answer: dict[str, Any],
    rounding: float = SCORE_ROUNDING,
) -> Trace:
    """The same tokens and pixels in, and out of them what PyTorch with the guard's hooks makes."""
    picture = None if question.image is None else Image.open(question.image)
    requests = [(text, picture) for text in question.texts]
    batch = collate(vlm.processor, vlm.image_token_id, requests)
    assert answer["input_ids"] == batch.input_ids.ravel().tolist()
    assert answer["attention_mask"] == batch.attention_mask.ravel().tolist()
    if batch.pixel_values is not None:
        pixels = np.array(answer["pixels"]).reshape(batch.pixel_values.shape)
        assert np.abs(pixels - batch.pixel_values).max() < PIXEL_ROUNDING
    wanted = TorchRunner(vlm, spec).run(batch, TOKENS)
    assert wanted.tokens.shape[1] == TOKENS
    assert answer["tokens"] == wanted.tokens.tolist()
    if wanted.guard_score is not None and wanted.guard_open is not None:
        scores, opened = said(answer)
        first = batch.input_ids.shape[1] - 1
        assert (opened == wanted.guard_open[:, first:, 0]).all()
        assert np.abs(scores - wanted.guard_score[:, first:, 0]).max() < rounding
    return wanted


def said(answer: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Scores and verdicts, [sequence, call]."""
    scores, opened = np.array(answer["said"]).transpose(1, 2, 0)
    return scores, opened.astype(bool)


Guarded = Callable[..., tuple[GuardSpec, Path]]


@pytest.fixture
def guarded(guard_folder: Guarded, vlm: Vlm, exported: Path) -> Guarded:
    """A guard for this model and the folder it was applied to."""

    def make(
        profile: str, threshold: float, pools: bool = False, source: Path = exported
    ) -> tuple[GuardSpec, Path]:
        place = {"width": 128, "layers": 6, "sensor": Site(2, "residual"), "edits": (4,)}
        changes = {"strength": 20.0, "threshold": threshold, "pools": pools} | place
        return guard_folder(vlm, source, profile, **changes)

    return make


def test_an_exported_folder_runs_as_it_is(
    vlm: Vlm, exported: Path, questions: tuple[Question, ...]
) -> None:
    for question, answer in zip(questions, ask(exported, *questions), strict=True):
        require_alike(vlm, None, question, answer)


@pytest.mark.parametrize("profile", ["always", "token"])
def test_a_guard_without_a_latch(
    guarded: Guarded,
    vlm: Vlm,
    questions: tuple[Question, ...],
    unguarded: list[Any],
    profile: str,
) -> None:
    spec, folder = guarded(profile, 0.0)
    answers = ask(folder, *questions)
    for question, answer, before in zip(questions, answers, unguarded, strict=True):
        require_alike(vlm, spec, question, answer)
        assert answer["tokens"] != before


@pytest.mark.parametrize("pools", [False, True])
def test_the_loop_carries_a_latched_guard(
    guarded: Guarded,
    vlm: Vlm,
    questions: tuple[Question, ...],
    unguarded: list[Any],
    pools: bool,
) -> None:
    scores = {}
    for threshold in (-FAR, FAR):
        spec, folder = guarded("sequence", threshold, pools)
        answers = ask(folder, *questions)
        for question, answer, before in zip(questions, answers, unguarded, strict=True):
            require_alike(vlm, spec, question, answer)
            assert (said(answer)[1] == (threshold < 0)).all()
            assert (answer["tokens"] == before) == (threshold > 0)
        scores[threshold] = said(answers[0])[0][0] + threshold  # of the picture's
    # decided by the prompt, though a token of the answer by itself says the opposite
    first = scores[FAR][0]
    for other in (scores[-FAR][1:].min(), scores[FAR][1:].max()):
        spec, folder = guarded("sequence", float((first + other) / 2), pools)
        (answer,) = ask(folder, questions[0])
        require_alike(vlm, spec, questions[0], answer)
        mine, opened = said(answer)
        assert set(opened.ravel()) == {bool(other < first)}
        assert mine.min() < 0 < mine.max()


@llava
def test_a_folder_in_float16(
    checkpoint: Path,
    guarded: Guarded,
    vlm: Vlm,
    questions: tuple[Question, ...],
    unguarded: list[Any],
    tmp_path: Path,
) -> None:
    """Held to PyTorch in float32: the same choices, and scores that float16 has rounded."""
    half = export(checkpoint, tmp_path / "half", "float16")
    for threshold in (-FAR, FAR):
        spec, folder = guarded("sequence", threshold, True, half)
        answers = ask(folder, *questions)
        for question, answer, before in zip(questions, answers, unguarded, strict=True):
            require_alike(vlm, spec, question, answer, SCORE_ROUNDING_HALF)
            assert (answer["tokens"] == before) == (threshold > 0)


@llava
def test_a_second_turn_is_decided_anew(
    guarded: Guarded, vlm: Vlm, questions: tuple[Question, ...]
) -> None:
    words = questions[1].texts[1]
    turn = vlm.processor.tokenizer(TURN, add_special_tokens=False)["input_ids"]

    def both_turns(threshold: float) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        _, folder = guarded("sequence", threshold)
        (answer,) = ask(folder, Question((words,), again=tuple(turn)))
        return *said(answer), *said(answer["second"])

    scores, opened, later, reopened = both_turns(FAR)
    assert not opened.any()
    assert not reopened.any()
    one, two = scores[0, 0] + FAR, later[0, 0] + FAR
    _, opened, _, reopened = both_turns(float((one + two) / 2))
    assert (opened == (one > two)).all()
    assert (reopened == (two > one)).all()


@llava
def test_what_carries_the_state_is_verified(
    run: Callable[..., int], guarded: Guarded, exported: Path
) -> None:
    """One file at a time is the unguarded folder's, whose loop would forget or see no image."""
    _, out = guarded("sequence", 0.0, pools=True)
    names = ["config.json", "onnx/embed_tokens.onnx", "onnx/vision_encoder.onnx"]
    for name in names:
        whole = (out / name).read_bytes()
        shutil.copyfile(exported / name, out / name)
        assert run("verify", out, "--unguarded", exported) == 6
        (out / name).write_bytes(whole)
    assert run("verify", out, "--unguarded", exported) == 0


@llava
def test_a_guard_that_cannot_be_carried_is_refused(
    run: Callable[..., int],
    guarded: Guarded,
    exported: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    guarded("sequence", 0.0, pools=True)
    pack, folder = tmp_path / "guard.safetensors", tmp_path / "folder"
    shutil.copytree(exported, folder)

    def refused(code: int, said: str) -> None:
        assert run("apply", folder, "--guard", pack, "-o", tmp_path / "out") == code
        assert said in capsys.readouterr().err
        assert not (tmp_path / "out").exists()

    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"model_type": "another"}))
    refused(3, "adds the inputs guard_image_mask, guard_memory, guard_state")
    path.write_text(json.dumps(config | {"text_config": {}}))
    refused(9, "num_hidden_layers")
    text = config["text_config"]
    path.write_text(json.dumps(config | {"text_config": text | {"num_hidden_layers": 5}}))
    refused(3, "past_key_values.5.")
    path.write_text(json.dumps(config))
    (folder / "onnx" / "vision_encoder.onnx").unlink()
    refused(3, "no graph with an output image_features")


@llava
def test_what_transformersjs_cannot_have_is_not_exported(
    checkpoint: Path, run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy, out = Path(shutil.copytree(checkpoint, tmp_path / "checkpoint")), tmp_path / "out"

    def refused(code: int, said: str, *more: str) -> None:
        assert run("export", copy, "-o", out, "--target", "transformersjs", *more) == code
        assert said in capsys.readouterr().err
        assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]

    refused(2, "zero-copy", "--weights", "zero-copy")
    refused(3, "bfloat16", "--dtype", "bfloat16")
    (copy / "processor_config.json").unlink()
    refused(3, "tokenizer.json, tokenizer_config.json and processor_config.json")
