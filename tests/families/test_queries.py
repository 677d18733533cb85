"""InstructBLIP: queries that read the instruction beside the image."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest

from guardbake.batch import Batch
from guardbake.steps.assemble import bundle_files
from guardbake.vlm.files import hash_files

from tests.families.test_families import FEATURES
from tests.onnx.conftest import Exported, largest_difference

pytestmark = pytest.mark.parametrize("member", ["instructblip"], indirect=True)


def test_the_words_beside_an_image_change_its_features(member: Exported, mixed: Batch) -> None:
    """Those of their own image alone; what stands beyond their end is not read."""
    ids = mixed.instruction_ids
    assert ids is not None
    assert (ids >= 0).sum(axis=1).tolist() == [5, 1, 2]
    right = member.runner.features(mixed)
    assert right is not None
    swapped = dataclasses.replace(mixed, instruction_ids=ids[[2, 1, 0]])
    wide = dataclasses.replace(
        mixed, instruction_ids=np.pad(ids, ((0, 0), (0, 3)), constant_values=-1)
    )
    rows = np.arange(len(right)).reshape(3, -1)
    apart = np.abs(np.asarray(member.runner.features(swapped)) - right)
    assert apart[rows[[0, 2]]].max() > 100 * FEATURES
    assert apart[rows[1]].max() <= FEATURES
    assert largest_difference(np.asarray(member.runner.features(wide)), right) <= FEATURES


def test_the_second_tokenizer_is_the_models(member: Exported, tmp_path: Path) -> None:
    """It is hashed with the checkpoint, and stands in the bundle."""
    name = "qformer_tokenizer/tokenizer.json"
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(member.vlm.folder, checkpoint)
    before = hash_files(checkpoint)
    assert before.digest == member.vlm.model_digest
    assert name in before.sha256
    (checkpoint / name).write_text("{}")
    assert hash_files(checkpoint).digest != before.digest
    folder = member.folder
    files = bundle_files(member.vlm.folder, folder, folder, folder, folder, "no engine")
    assert files[f"processor/{name}"] == member.vlm.folder / name
