"""What `guardbake export` refuses, before any work and leaving nothing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from guardbake.vlm.catalog import models_root

Run = Callable[..., int]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return Path(shutil.copytree(models_root() / "tiny-llava", tmp_path / "checkpoint"))


def test_what_is_no_checkpoint_is_refused(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    def refused(code: int) -> None:
        assert run("export", checkpoint, "-o", tmp_path / "out") == code
        assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint"]

    weights, config = checkpoint / "model.safetensors", checkpoint / "config.json"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-8])
    refused(9)  # cut
    weights.rename(checkpoint / "pytorch_model.bin")
    refused(3)  # nothing in safetensors
    weights.write_bytes(whole)
    text = config.read_text()
    config.write_text(json.dumps(json.loads(text) | {"model_type": "another"}))
    refused(3)
    layers = json.loads(text)
    layers["text_config"] |= {"model_type": "qwen2", "layer_types": ["full_attention"]}
    config.write_text(json.dumps(layers))
    refused(9)  # a configuration that contradicts itself
    config.unlink()
    refused(2)
    assert run("export", tmp_path / "absent", "-o", tmp_path / "out") == 2


def test_an_existing_folder_is_left_alone(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "kept").write_text("mine")
    assert run("export", checkpoint, "-o", tmp_path / "out") == 2
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["kept"]
