"""Checkpoints whose tensors are not the model's, and those whose are under other names."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from guardbake.errors import GuardbakeError, IntegrityError, MalformedError, UnsupportedError
from guardbake.vlm.catalog import models_root
from guardbake.vlm.hollow import hollow_model
from guardbake.vlm.load import load_vlm
from guardbake.vlm.tensors import parameters_in, stored_tensors

Tensors = dict[str, torch.Tensor]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return Path(shutil.copytree(models_root() / "tiny-llava", tmp_path / "copy"))


def rewrite(checkpoint: Path, change: Callable[[Tensors], object]) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    change(tensors)
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("name", ["tiny-llava", "tiny-qwen2_5_vl"])
def test_every_parameter_is_found_and_is_what_transformers_loads(name: str) -> None:
    folder = models_root() / name
    found = parameters_in(folder, hollow_model(folder))
    loaded = dict(load_vlm(str(folder)).model.named_parameters(remove_duplicate=False))
    assert set(found) == set(loaded)
    for path, parameter in loaded.items():
        tensor = found[path]
        assert torch.equal(tensor.read().to(parameter.dtype).view(tensor.shape), parameter), path


def test_a_part_of_a_tensor_is_read_alone() -> None:
    folder = models_root() / "tiny-llava"
    tensor = next(iter(stored_tensors(folder).values()))
    assert torch.equal(tensor.read(3, 7), tensor.read()[3:7])


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (lambda t: t.pop(_key(t)), MalformedError, "no tensor for .*down_proj"),
        (
            lambda t: t.update({_key(t): t[_key(t)][:5].clone()}),
            MalformedError,
            r"shape \[5, 384\]",
        ),
        (lambda t: t.update(surprise=torch.zeros(2)), UnsupportedError, "no place"),
        (
            lambda t: t.update({_key(t): t[_key(t)].to(torch.float8_e4m3fn)}),
            UnsupportedError,
            "of type F8_E4M3",
        ),
    ],
    ids=["missing", "of another shape", "extra", "quantised"],
)
def test_tensors_that_are_not_the_models_are_refused(
    checkpoint: Path,
    change: Callable[[Tensors], object],
    error: type[GuardbakeError],
    match: str,
) -> None:
    rewrite(checkpoint, change)
    with pytest.raises(error, match=match):
        parameters_in(checkpoint, hollow_model(checkpoint))


def _key(tensors: Tensors) -> str:
    return next(key for key in sorted(tensors) if key.endswith("down_proj.weight"))


def test_what_every_model_computes_may_be_stored_too(checkpoint: Path) -> None:
    rewrite(
        checkpoint,
        lambda t: t.update({"language_model.model.layers.0.rotary_emb.inv_freq": torch.zeros(2)}),
    )
    parameters_in(checkpoint, hollow_model(checkpoint))


def test_an_index_that_its_shards_contradict_is_refused(checkpoint: Path) -> None:
    index = {"weight_map": {"absent.weight": "model.safetensors"}}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(MalformedError, match=r"no tensor absent\.weight"):
        stored_tensors(checkpoint)


def test_offsets_that_do_not_fit_the_shape_are_refused(checkpoint: Path) -> None:
    path = checkpoint / "model.safetensors"
    header = b'{"a":{"dtype":"F32","shape":[3],"data_offsets":[0,8]}}'
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(MalformedError, match="8 bytes for a; expected 12"):
        stored_tensors(checkpoint)


def test_weights_under_another_name_are_refused(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").rename(checkpoint / "consolidated.safetensors")
    with pytest.raises(UnsupportedError, match="neither model"):
        stored_tensors(checkpoint)


def test_a_file_that_shrinks_while_it_is_read_is_refused(checkpoint: Path) -> None:
    last = max(stored_tensors(checkpoint).values(), key=lambda tensor: tensor.offset)
    raw = last.file.read_bytes()
    last.file.write_bytes(raw[:-4])
    with pytest.raises(IntegrityError, match="the end of the file"):
        last.read()
