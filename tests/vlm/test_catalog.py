"""Family files: those we ship, and what is refused."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from guardbake.errors import MalformedError, UnsupportedError
from guardbake.vlm.catalog import families, family_from_toml, family_of, models_root


@dataclass
class Config:
    model_type: str


def test_every_family_is_found_and_is_of_transformers() -> None:
    names = [family.name for family in families()]
    assert names == sorted(names)
    assert {"idefics3", "internvl", "llava", "llava_next", "qwen2_5_vl", "smolvlm"} <= set(names)
    assert {family.model_type for family in families()} <= set(CONFIG_MAPPING_NAMES)
    assert family_of(Config("qwen2_5_vl")).position == "mrope"
    assert family_of(Config("llava")).feed_forward_path(3) == "model.language_model.layers.3.mlp"
    assert family_of(Config("llava")).layer_path(0) == "model.language_model.layers.0"


def test_an_unknown_family_lists_the_known_ones() -> None:
    with pytest.raises(UnsupportedError, match=r"'blip'.*llava, .*qwen2_5_vl"):
        family_of(Config("blip"))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('name = "llava"', ""),
        ('name = "llava"', 'name = "llava"\ncolour = "red"'),
        ('name = "llava"', "name = 3"),
        ('position = "sequential"', 'position = "random"'),
        ('kind = "clip"', 'kind = "sonar"'),
        ('mask = "causal"', 'mask = "sparse"'),
        ("[vision]", "[sight]"),
        ("[vision]", "[vision"),
    ],
)
def test_a_family_file_is_strict(old: str, new: str) -> None:
    text = (models_root() / "llava.toml").read_text(encoding="utf-8")
    assert old in text
    with pytest.raises(MalformedError, match=r"llava\.toml"):
        family_from_toml(text.replace(old, new, 1), "llava.toml")
