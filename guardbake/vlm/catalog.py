"""The model families guardbake knows, read from models/*.toml: which module is what.

A family is data. A new one is a TOML file here and, only if its vision tower needs code of its own,
a small module in the exporter.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal, Protocol, cast, get_args

from guardbake.batch import MaskKind
from guardbake.errors import EnvironmentFault, MalformedError, UnsupportedError

PositionKind = Literal["sequential", "mrope"]
PromptKind = Literal["chat", "words", "marked words"]
"""How words are asked: "chat" by the checkpoint's chat template, beside a picture or without one.
The others as they are, and beside a picture always: the processor has no prompt without. It puts
the image tokens in front itself, or, of "marked words", where the text marks them."""
VisionKind = Literal[
    "anyres",
    "clip",
    "idefics3",
    "internvl",
    "qformer",
    "qwen2_5_vl",
    "qwen2_vl",
    "qwen3_vl",
    "siglip",
]
"""How a tower is fed. Tiles of one size, so many tokens each: "clip" (the hidden states that the
configuration chooses), "internvl" (those, neighbours made one), "idefics3" and "siglip" (the last
state), "qformer" (that, as queries see it that read the words too). "anyres": tiles of one image
laid out as the image, in rows that end in a newline. Packed patches of any grid: "qwen2_vl",
"qwen2_5_vl" (in windows), "qwen3_vl" (with deepstack features)."""

_KEYS: Mapping[str, tuple[str, ...]] = {
    "family": ("name", "model_type", "image_token", "prompt", "position", "mask"),
    "decoder": ("text", "root", "layers", "attention", "feed_forward", "embedding", "head"),
    "vision": ("kind", "root", "projector"),
}


class HasModelType(Protocol):
    """A transformers configuration, as far as the catalog looks at it."""

    model_type: str


@dataclass(frozen=True)
class Family:
    """Where the parts of a model family are: dotted module paths inside the transformers model.

    model_type: the key of config.json that tells the family.
    image_token: the key of config.json that holds the image token's id.
    prompt: how words are asked, see PromptKind.
    position: "sequential" position ids are [B, T], "mrope" ones are [3, B, T].
    mask: what a token attends to, see MaskKind.
    text: the model_type that the text model must have, "" for any.
    decoder, layers, embedding, head: the text model, its layer list, its embedding, the LM head.
    attention, feed_forward: the modules inside one layer whose outputs join the residual: attention
    and FFN, or where a norm comes after them that norm.
    vision_kind: which capture the vision tower needs; vision, projector: its modules ("" if none).
    """

    name: str
    model_type: str
    image_token: str
    prompt: PromptKind
    position: PositionKind
    mask: MaskKind
    text: str
    decoder: str
    layers: str
    attention: str
    feed_forward: str
    embedding: str
    head: str
    vision_kind: VisionKind
    vision: str
    projector: str

    @property
    def imageless(self) -> bool:
        """Whether it can be asked in words alone."""
        return self.prompt == "chat"

    @property
    def deepstack(self) -> bool:
        """Whether the first decoder layers get image features of their own (arXiv 2406.04334)."""
        return self.vision_kind == "qwen3_vl"

    def layer_path(self, layer: int) -> str:
        """The module path of decoder layer `layer`, counted from 0."""
        return f"{self.layers}.{layer}"

    def feed_forward_path(self, layer: int) -> str:
        """The module path of the FFN of decoder layer `layer`."""
        return f"{self.layers}.{layer}.{self.feed_forward}"


def models_root() -> Path:
    """The folder of model data: guardbake/models in an installed wheel, models/ in a checkout."""
    package = Path(__file__).resolve().parent.parent
    for folder in (package / "models", package.parent / "models"):
        if (folder / "llava.toml").is_file():
            return folder
    raise EnvironmentFault(
        found="no folder of model data",
        expected="guardbake/models (installed) or models/ (checkout)",
        where=str(package),
        remedy="install guardbake again",
    )


@cache
def families() -> tuple[Family, ...]:
    """Every family in models/*.toml (the files with a [family] table), sorted by name."""
    found = []
    for path in sorted(models_root().glob("*.toml")):
        text = path.read_text(encoding="utf-8")
        if re.search(r"^\[family\]", text, re.MULTILINE):
            found.append(family_from_toml(text, str(path)))
    return tuple(sorted(found, key=lambda family: family.name))


def family_of(config: HasModelType) -> Family:
    """The family of a transformers configuration; UnsupportedError lists the known ones."""
    for family in families():
        if family.model_type == config.model_type:
            return family
    raise UnsupportedError(
        found=f"model_type {config.model_type!r}",
        expected="one of " + ", ".join(family.model_type for family in families()),
        where="config.json",
        remedy="use a model of a known family, or describe the family in models/<name>.toml",
    )


def family_from_toml(text: str, where: str) -> Family:
    """Parse one family file strictly: every key once, none unknown. Raises MalformedError."""
    try:
        tables = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise _malformed(str(error), "TOML", where) from error
    if set(tables) != set(_KEYS):
        raise _malformed(f"tables {sorted(tables)}", f"tables {sorted(_KEYS)}", where)
    values = {table: _strings(tables[table], keys, table, where) for table, keys in _KEYS.items()}
    family, decoder, vision = values["family"], values["decoder"], values["vision"]
    for name, value, kinds in (
        ("prompt", family["prompt"], PromptKind),
        ("position", family["position"], PositionKind),
        ("mask", family["mask"], MaskKind),
        ("vision kind", vision["kind"], VisionKind),
    ):
        if value not in get_args(kinds):
            raise _malformed(f"{name} {value!r}", str(get_args(kinds)), where)
    return Family(
        name=family["name"],
        model_type=family["model_type"],
        image_token=family["image_token"],
        prompt=cast(PromptKind, family["prompt"]),
        position=cast(PositionKind, family["position"]),
        mask=cast(MaskKind, family["mask"]),
        text=decoder["text"],
        decoder=decoder["root"],
        layers=decoder["layers"],
        attention=decoder["attention"],
        feed_forward=decoder["feed_forward"],
        embedding=decoder["embedding"],
        head=decoder["head"],
        vision_kind=cast(VisionKind, vision["kind"]),
        vision=vision["root"],
        projector=vision["projector"],
    )


def _strings(table: object, keys: tuple[str, ...], name: str, where: str) -> dict[str, str]:
    if not isinstance(table, dict) or set(table) != set(keys):
        found = sorted(table) if isinstance(table, dict) else type(table).__name__
        raise _malformed(f"[{name}] with {found}", f"exactly the keys {sorted(keys)}", where)
    wrong = sorted(key for key, value in table.items() if not isinstance(value, str))
    if wrong:
        raise _malformed(f"[{name}] keys {wrong} that are no strings", "strings", where)
    return {key: str(value) for key, value in table.items()}


def _malformed(found: str, expected: str, where: str) -> MalformedError:
    return MalformedError(found=found, expected=expected, where=where, remedy="correct the file")
