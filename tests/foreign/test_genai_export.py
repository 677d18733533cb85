"""`export --target genai`: each family in onnxruntime-genai itself, guarded and not."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from guardbake.plugins import Number, Storage
from guardbake.progress import PlainReporter
from guardbake.site import Site
from guardbake.spec import GuardSpec
from guardbake.steps.export import export_checkpoint
from guardbake.vlm.load import Vlm, load_vlm
from guardbake.vlm.runner import TorchRunner

from tests.foreign.genai_checkpoints import FAMILIES, LEAST, MOST, PATCH, make_checkpoint, marks_of
from tests.foreign.genai_loop import Said, ask, draw, require_alike

WORDS = "what is drawn here?"
WIDE, TALL = (60, 100), (90, 40)
# float32 on both sides, whose kernels sum in other orders: scores of some units, seen 8e-6 apart
ROUNDING, PIXEL_ROUNDING = 2e-5, 1e-6
# float16 keeps 2^-11 of a value: pixels of up to two, streams of some units, seen 7e-3 apart
ROUNDING_HALF, PIXEL_ROUNDING_HALF = 2e-2, 2e-3
# a Gemma's pictures, resized linearly, differ from Pillow's by one of 255 levels here and there,
# which normalising doubles
LEVEL = 1.001 / 255 / 0.5
FAR = 30.0  # further than any score
of_one_family = pytest.mark.parametrize("checkpoint", ["qwen3_vl"], indirect=True)


@pytest.fixture(scope="module", params=FAMILIES)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / str(request.param)
    make_checkpoint(str(request.param), folder)
    return folder


@pytest.fixture(scope="module")
def vlm(checkpoint: Path) -> Vlm:
    return load_vlm(str(checkpoint))


@pytest.fixture(scope="module")
def exported(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(checkpoint, tmp_path_factory.mktemp("genai") / "exported")


def export(
    checkpoint: Path, folder: Path, storage: Storage = "stream", number: Number = "float32"
) -> Path:
    reporter = PlainReporter(io.StringIO())
    export_checkpoint(str(checkpoint), folder, storage, number, "genai", reporter)
    return folder


def say(
    folder: Path,
    vlm: Vlm,
    tmp_path: Path,
    *sizes: tuple[int, int],
    rounding: float | None = None,
) -> Said:
    """The words behind pictures of those sizes; the same tokens and pixels as Python's."""
    pictures = [draw(size, tmp_path / f"{n}.png") for n, size in enumerate(sizes)]
    first, image, last = marks_of(vlm.family.name)
    mark = first if vlm.family.name == "gemma3" else f"{first}{image}{last}"
    prompt = mark * len(sizes) + WORDS
    said, _ = ask(folder, prompt, pictures, vlm)
    images = [Image.open(picture) for picture in pictures] or None
    wanted = vlm.processor(text=[prompt], images=images, return_tensors="np")
    assert said.batch.input_ids.tolist() == wanted["input_ids"].tolist()
    if sizes:
        exactly = LEVEL if vlm.family.name == "gemma3" else PIXEL_ROUNDING
        got, pixels = said.batch.pixel_values, wanted["pixel_values"]
        assert got is not None
        assert got.shape == pixels.shape
        assert np.abs(got - pixels).max() < (rounding or exactly)
    return said


Guarded = Callable[..., tuple[GuardSpec, Path]]


@pytest.fixture
def guarded(guard_folder: Guarded, vlm: Vlm, exported: Path) -> Guarded:
    """A guard for this model and the folder it was applied to."""

    def make(
        profile: str, threshold: float = 0.0, pools: bool = False, source: Path = exported
    ) -> tuple[GuardSpec, Path]:
        place = {"width": 32, "layers": 5, "sensor": Site(2, "residual"), "edits": (3,)}
        changes = {"strength": 4.0, "threshold": threshold, "pools": pools} | place
        return guard_folder(vlm, source, profile, **changes)

    return make


@pytest.mark.parametrize("sizes", [(), (WIDE,), (TALL,), (WIDE, WIDE)])
def test_an_exported_folder_runs_as_it_is(
    vlm: Vlm, exported: Path, tmp_path: Path, sizes: tuple[tuple[int, int], ...]
) -> None:
    require_alike(vlm, None, say(exported, vlm, tmp_path, *sizes), ROUNDING)


@pytest.mark.parametrize("profile", ["always", "token"])
def test_a_guard_without_a_latch(guarded: Guarded, vlm: Vlm, tmp_path: Path, profile: str) -> None:
    spec, folder = guarded(profile)
    said = say(folder, vlm, tmp_path, WIDE)
    require_alike(vlm, spec, said, ROUNDING)
    assert (
        said.tokens != TorchRunner(vlm, None).run(said.batch, len(said.tokens)).tokens[0].tolist()
    )


@pytest.mark.parametrize("pools", [False, True])
def test_the_loop_carries_a_latched_guard(
    guarded: Guarded, vlm: Vlm, tmp_path: Path, pools: bool
) -> None:
    answers, scores = {}, {}
    for threshold in (-FAR, FAR):
        spec, folder = guarded("sequence", threshold, pools)
        said = say(folder, vlm, tmp_path, WIDE)
        require_alike(vlm, spec, said, ROUNDING)
        assert set(said.opened) == {threshold < 0}
        answers[threshold], scores[threshold] = said.tokens, np.array(said.scores) + threshold
    assert answers[-FAR] != answers[FAR]
    # decided by the prompt, though a token of the answer by itself says the opposite
    first = scores[FAR][0]
    for other in (scores[-FAR][1:].min(), scores[FAR][1:].max()):
        spec, folder = guarded("sequence", float((first + other) / 2), pools)
        said = say(folder, vlm, tmp_path, WIDE)
        require_alike(vlm, spec, said, ROUNDING)
        assert set(said.opened) == {bool(other < first)}
        assert min(said.scores) < 0 < max(said.scores)


@of_one_family
def test_weights_that_stay_in_the_checkpoint(
    checkpoint: Path, guarded: Guarded, vlm: Vlm, tmp_path: Path
) -> None:
    folder = export(checkpoint, tmp_path / "linked", "zero-copy")
    weights, shared = checkpoint / "model.safetensors", folder / "model.safetensors"
    assert weights.samefile(shared)
    require_alike(vlm, None, say(folder, vlm, tmp_path, WIDE), ROUNDING)
    spec, out = guarded("sequence", 0.0, True, folder)
    require_alike(vlm, spec, say(out, vlm, tmp_path, WIDE), ROUNDING)


def test_a_folder_in_float16(checkpoint: Path, guarded: Guarded, vlm: Vlm, tmp_path: Path) -> None:
    """Held to PyTorch in float32: the same choices, and scores that float16 has rounded."""
    half = export(checkpoint, tmp_path / "half", "stream", "float16")
    spec, folder = guarded("sequence", -FAR, True, half)
    said = say(folder, vlm, tmp_path, WIDE, rounding=PIXEL_ROUNDING_HALF)
    require_alike(vlm, spec, said, ROUNDING_HALF)


@of_one_family
def test_the_image_processor_of_a_published_checkpoint(
    checkpoint: Path, exported: Path, tmp_path: Path
) -> None:
    """In a file of its own, by older keys, beside a processor with a part for videos."""
    copy = Path(shutil.copytree(checkpoint, tmp_path / "checkpoint"))
    (copy / "processor_config.json").unlink()
    said = {
        "processor_class": "Qwen3VLProcessor",
        "image_processor_type": "Qwen2VLImageProcessorFast",
    }
    said |= {"patch_size": PATCH, "merge_size": 2, "temporal_patch_size": 2}
    said |= {"min_pixels": LEAST, "max_pixels": MOST}
    (copy / "preprocessor_config.json").write_text(json.dumps(said))
    folder = export(copy, tmp_path / "exported")
    for name in ("processor_config.json", "genai_config.json"):
        assert (folder / name).read_text() == (exported / name).read_text()


Refused = Callable[..., None]


@pytest.fixture
def copy(checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint, tmp_path / "checkpoint"))


@pytest.fixture
def refused(
    copy: Path, run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Refused:
    def check(code: int, said: str, *more: str) -> None:
        out = tmp_path / "out"
        assert run("export", copy, "-o", out, "--target", "genai", *more) == code
        assert said in capsys.readouterr().err
        assert not out.exists()

    return check


@of_one_family
def test_what_genai_cannot_have_is_not_exported(copy: Path, refused: Refused) -> None:
    refused(3, "bfloat16", "--dtype", "bfloat16")
    path = copy / "tokenizer.json"
    whole = path.read_text()
    path.write_text(json.dumps(json.loads(whole) | {"model": {"type": "WordLevel"}}))
    refused(3, "WordLevel")
    for added in (5, [{"content": ["a"]}], []):
        path.write_text(json.dumps(json.loads(whole) | {"added_tokens": added}))
        refused(3, "a tokenizer without <|vision_start|>")
    path.write_text("[]")
    refused(9, "a JSON list")
    path.unlink()
    refused(3, "tokenizer.json, tokenizer_config.json and processor_config.json")
    path.write_text(whole)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"model_type": "llava"}))
    refused(3, "a llava")


@of_one_family
def test_an_image_processor_that_genai_cannot_follow(copy: Path, refused: Refused) -> None:
    path = copy / "processor_config.json"
    processor = json.loads(path.read_text())

    def changed(**keys: object) -> None:
        pixels = processor["image_processor"] | keys
        path.write_text(json.dumps(processor | {"image_processor": pixels}))

    changed(do_normalize=False)
    refused(3, "another do_normalize")
    changed(resample=5)
    refused(9, "sizes, means and scales of pixels")
    changed(image_mean=3)
    refused(9, "sizes, means and scales of pixels")
    for text in ("{", "[]"):
        path.write_text(text)
        refused(9, str(path))


@pytest.mark.parametrize("checkpoint", ["gemma3"], indirect=True)
def test_what_of_a_gemma_genai_cannot_have(copy: Path, refused: Refused) -> None:
    """Images of 256 tokens, one view of each."""
    path = copy / "processor_config.json"
    processor = json.loads(path.read_text())
    processor["image_processor"]["do_pan_and_scan"] = True
    path.write_text(json.dumps(processor))
    refused(3, "another do_pan_and_scan")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"mm_tokens_per_image": 64}))
    refused(3, "images of 64 tokens")
