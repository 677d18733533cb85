"""Requests in other words or beside other pictures: what an attacker does without a gradient."""

from __future__ import annotations

import hashlib
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from guardbake.errors import MalformedError, RecipeError
from guardbake.evaluate.attacks.pgd import Bytes
from guardbake.samples import Sample
from guardbake.samples.pictures import FORMATS, open_picture
from guardbake.samples.typography import CELL, Tokenizer
from guardbake.vlm.requests import Asking, Typography
from guardbake.vlm.tokens import Request

PLACE = "{request}"


@dataclass(frozen=True)
class Templated:
    """The words of the inner asking inside a template, each template in turn by the words."""

    inner: Asking
    templates: Sequence[str]

    def request(self, sample: Sample, tokenizer: Tokenizer) -> Request:
        text, image = self.inner.request(sample, tokenizer)
        return self.templates[_draw(text, len(self.templates))].replace(PLACE, text), image


@dataclass(frozen=True)
class Pictured:
    """The inner asking's text beside other pictures, [h, w, 3] of 8 bit by (source, index)."""

    inner: Asking
    pictures: Mapping[tuple[str, int], Bytes]

    def request(self, sample: Sample, tokenizer: Tokenizer) -> Request:
        text, _ = self.inner.request(sample, tokenizer)
        return text, Image.fromarray(self.pictures[sample.source, sample.index])


@dataclass(frozen=True)
class Photographed:
    """The words beside a crop of a photograph from a folder, both drawn by the words."""

    typography: Typography
    files: Sequence[Path]

    def request(self, sample: Sample, tokenizer: Tokenizer) -> Request:
        text, _ = self.typography.request(sample, tokenizer)
        path = self.files[_draw(text, len(self.files))]
        photograph = open_picture(path, path.name)
        width, height = self.typography.columns * CELL, self.typography.rows * CELL
        scale = max(width / photograph.width, height / photograph.height)
        size = (round(photograph.width * scale), round(photograph.height * scale))
        left = _draw(f"left:{text}", size[0] - width + 1)
        top = _draw(f"top:{text}", size[1] - height + 1)
        return text, photograph.resize(size).crop((left, top, left + width, top + height))


def photographs(folder: Path) -> list[Path]:
    """The picture files directly in `folder`, sorted. Raises RecipeError if there is none."""
    endings = {f".{name.lower()}" for name in FORMATS} | {".jpg"}
    found = sorted(p for p in folder.glob("*") if p.suffix.lower() in endings and p.is_file())
    if not found:
        raise RecipeError(
            found="no photograph",
            expected=f"pictures in {', '.join(FORMATS)}",
            where=str(folder),
            remedy="put photographs there, or leave the family photograph out",
        )
    return found


def read_templates(path: Path) -> dict[str, list[str]]:
    """Jailbreak templates by family, each with one place for the request.

    A TOML file, one table a family with `source`, where it is described, and `templates`. Raises
    RecipeError if there is no such file, MalformedError if it is anything else.
    """
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(
            found=f"no readable file ({error.strerror})",
            expected="a file of jailbreak templates",
            where=str(path),
            remedy="correct evaluate.templates in the recipe",
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise _malformed(path, f"no TOML: {error}") from error
    families = {}
    for name, table in tables.items():
        if not isinstance(table, dict) or set(table) != {"source", "templates"}:
            raise _malformed(path, f"other keys in {name!r}")
        texts = table["templates"]
        if not isinstance(texts, list) or not texts:
            raise _malformed(path, f"no templates in {name!r}")
        if not all(isinstance(text, str) and text.count(PLACE) == 1 for text in texts):
            raise _malformed(path, f"a template without exactly one {PLACE} in {name!r}")
        families[name] = texts
    if not families:
        raise _malformed(path, "no family")
    return families


def _malformed(path: Path, found: str) -> MalformedError:
    return MalformedError(
        found=found,
        expected="tables with source and templates",
        where=str(path),
        remedy="write it as models/prompts/templates.toml is written",
    )


def _draw(key: str, count: int) -> int:
    """A number below `count` that depends on the words alone."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little") % count
