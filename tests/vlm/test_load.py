"""Checkpoints that are not what they claim to be, and one that is."""

from __future__ import annotations

import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from guardbake.errors import EnvironmentFault, MalformedError, UnsupportedError, UsageError
from guardbake.vlm.catalog import models_root
from guardbake.vlm.files import check_weights, digest_checkpoint
from guardbake.vlm.load import load_vlm


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A copy of the tiny LLaVA to be damaged."""
    return Path(shutil.copytree(models_root() / "tiny-llava", tmp_path / "copy"))


def weights_of(checkpoint: Path) -> Path:
    (file,) = checkpoint.glob("*.safetensors")
    return file


@pytest.mark.parametrize("name", ["tiny-llava", "tiny-qwen2_5_vl"])
def test_a_checkpoint_loads_ready_to_run(name: str) -> None:
    vlm = load_vlm(str(models_root() / name))
    assert vlm.model.dtype == torch.float32
    assert not vlm.model.training
    assert vlm.model.config.get_text_config()._attn_implementation == "sdpa"
    assert name == f"tiny-{vlm.family.name}"
    assert vlm.image_token_id == vlm.processor.tokenizer.convert_tokens_to_ids(
        vlm.processor.image_token
    )
    vlm.model.get_submodule(vlm.family.feed_forward_path(0))
    vlm.model.get_submodule(vlm.family.vision)


def test_a_cut_file_is_named(checkpoint: Path) -> None:
    file = weights_of(checkpoint)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(MalformedError, match=rf"as the header says; in .*{file.name}"):
        load_vlm(str(checkpoint))


@pytest.mark.parametrize("size", [0, 5, 40])
def test_a_cut_header_is_named(checkpoint: Path, size: int) -> None:
    file = weights_of(checkpoint)
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(MalformedError, match=f"whole header; in .*{file.name}"):
        load_vlm(str(checkpoint))


@pytest.mark.parametrize("header", [b"{]", b"[1]", b'{"a": {}}', b'{"a": {"data_offsets": 3}}'])
def test_a_header_of_another_kind_is_named(checkpoint: Path, header: bytes) -> None:
    file = weights_of(checkpoint)
    file.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(MalformedError, match=f"JSON header; in .*{file.name}"):
        check_weights(checkpoint)


def test_a_missing_shard_is_named(checkpoint: Path) -> None:
    index = {"weight_map": {"a": "model-00002-of-00002.safetensors"}}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(MalformedError, match="no file model-00002"):
        check_weights(checkpoint)


def test_a_missing_tensor_is_not_filled_with_random_numbers(checkpoint: Path) -> None:
    tensors = load_file(weights_of(checkpoint))
    name = next(key for key in sorted(tensors) if key.endswith("down_proj.weight"))
    del tensors[name]
    save_file(tensors, weights_of(checkpoint), metadata={"format": "pt"})
    with pytest.raises(MalformedError, match=r"1 tensors missing.*down_proj\.weight"):
        load_vlm(str(checkpoint))


def test_pickled_weights_are_never_opened(checkpoint: Path) -> None:
    weights_of(checkpoint).rename(checkpoint / "pytorch_model.bin")
    with pytest.raises(UnsupportedError, match="no safetensors"):
        load_vlm(str(checkpoint))


def test_an_unknown_family_is_refused_before_the_weights(checkpoint: Path) -> None:
    config = checkpoint / "config.json"
    config.write_text(config.read_text().replace('"llava"', '"another"'))
    weights_of(checkpoint).unlink()
    with pytest.raises(UnsupportedError, match="model_type 'another'"):
        load_vlm(str(checkpoint))


def test_no_folder_and_no_configuration_are_usage_errors(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no folder and no cached model"):
        load_vlm(str(tmp_path / "absent"))
    with pytest.raises(UsageError, match=r"no config\.json"):
        load_vlm(str(tmp_path))


def test_the_digest_sees_every_byte_that_matters(checkpoint: Path) -> None:
    before = digest_checkpoint(checkpoint)
    (checkpoint / "README.md").write_text("a model")
    assert digest_checkpoint(checkpoint) == before
    raw = bytearray(weights_of(checkpoint).read_bytes())
    raw[-1] ^= 1
    weights_of(checkpoint).write_bytes(raw)
    assert digest_checkpoint(checkpoint) != before


@pytest.mark.skipif(find_spec("torchvision") is not None, reason="torchvision is installed")
@pytest.mark.parametrize("kind", ["Qwen2_5_VLProcessor", "Qwen3VLProcessor"])
def test_a_processor_that_wants_a_package_says_which(checkpoint: Path, kind: str) -> None:
    """As published: images in a file of their own, and a part for videos that the name brings."""
    (checkpoint / "processor_config.json").unlink()
    pixels = {"image_processor_type": "Qwen2VLImageProcessor", "processor_class": kind}
    (checkpoint / "preprocessor_config.json").write_text(json.dumps(pixels))
    with pytest.raises(EnvironmentFault, match=r"orchvision.*; install them"):
        load_vlm(str(checkpoint))


@pytest.mark.parametrize("text", ["{}", "[]", "{", '{"processor_class": 3}'])
def test_a_processor_that_cannot_be_read_is_malformed(checkpoint: Path, text: str) -> None:
    (checkpoint / "processor_config.json").write_text(text)
    with pytest.raises(MalformedError, match=str(checkpoint)):
        load_vlm(str(checkpoint))
