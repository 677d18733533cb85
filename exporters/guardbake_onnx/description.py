"""model.json: all that running the graphs needs to know of a model, without its configuration."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from guardbake.batch import MaskKind
from guardbake.errors import MalformedError
from guardbake.vlm.catalog import PositionKind, VisionKind

FILE_NAME = "model.json"
FORMAT = 3


@dataclass(frozen=True)
class VisionGeometry:
    """How an image becomes patches, in pixels unless said otherwise.

    merge: patches per image token along one side. window: side of an attention window; 0 if none.
    image_size: side of the only image or tile size accepted; 0 if any size is.
    layouts: height and width of every layout of tiles, anyres only. tile_limit: beyond how many
      tiles' features a layout is resampled; 0 if never. position_side: side of the table of
      positions that is resampled to an image's grid; 0 if there is none.
    """

    kind: VisionKind
    patch_size: int
    merge: int
    window: int
    image_size: int
    layouts: tuple[tuple[int, int], ...] = ()
    tile_limit: int = 0
    position_side: int = 0


@dataclass(frozen=True)
class Description:
    """What the runner and later tools know of an exported model.

    layers, kv_heads, head_dim: shape of the cache. hidden: model width d. vocab: V.
    end_ids: tokens that end an answer. pad_id: what to feed where nothing is meant.
    model_digest: of the checkpoint the graphs were captured from. deepstack: how many decoder
    layers get image features of their own.
    """

    family: str
    model_digest: str
    layers: int
    kv_heads: int
    head_dim: int
    hidden: int
    vocab: int
    image_token_id: int
    end_ids: tuple[int, ...]
    pad_id: int
    position: PositionKind
    mask: MaskKind
    deepstack: int
    vision: VisionGeometry

    def to_json(self) -> str:
        """Deterministic JSON with a trailing newline."""
        values = {"format": FORMAT, **dataclasses.asdict(self)}
        return json.dumps(values, indent=2, sort_keys=True) + "\n"


def read_description(folder: Path) -> Description:
    """Read folder/model.json strictly; MalformedError on any other content."""
    path = folder / FILE_NAME
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values.pop("format") != FORMAT:
            raise ValueError("another format number")
        vision = values.pop("vision")
        vision["layouts"] = tuple((int(height), int(width)) for height, width in vision["layouts"])
        geometry = _typed(VisionGeometry, vision)
        values["end_ids"] = tuple(values["end_ids"])
        return Description(vision=geometry, **_typed_fields(Description, values, {"vision"}))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise MalformedError(
            found=f"{type(error).__name__}: {error}",
            expected=f"the description that the exporter writes, format {FORMAT}",
            where=str(path),
            remedy="export the model again",
        ) from error


def _typed(kind: type[VisionGeometry], values: Mapping[str, Any]) -> VisionGeometry:
    return kind(**_typed_fields(kind, values, set()))


def _typed_fields(kind: type, values: Mapping[str, Any], without: set[str]) -> dict[str, Any]:
    """The values, if they are exactly the fields of the dataclass and integers where it says so."""
    fields = {f.name: str(f.type) for f in dataclasses.fields(kind) if f.name not in without}
    if set(values) != set(fields):
        raise ValueError(f"keys {sorted(set(values) ^ set(fields))} are missing or unknown")
    for name, declared in fields.items():
        expected = tuple if declared.startswith("tuple") else {"int": int}.get(declared, str)
        if type(values[name]) is not expected:
            raise ValueError(f"{name} is no {declared}")
    return dict(values)
