"""Pictures from disk: read as RGB, bounded before they are decoded, refused with a name."""

from __future__ import annotations

import struct
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from guardbake.errors import MalformedError, UsageError
from guardbake.samples import Form, Sample
from guardbake.samples.pictures import PIXELS, open_picture


def _encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    buffer = BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def _claims(width: int, height: int) -> bytes:
    """A PNG of 60 bytes that claims so many pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b""))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "GIF"])
def test_a_file_and_its_bytes_are_the_same_rgb_picture(kind: str, tmp_path: Path) -> None:
    content = _encoded(Image.new("RGB", (6, 4), (10, 200, 30)), kind)
    (tmp_path / "a").write_bytes(content)
    first, second = open_picture(tmp_path / "a", "x [0]"), open_picture(content, "x [0]")
    assert (first.mode, first.size) == ("RGB", (6, 4))
    assert first.tobytes() == second.tobytes()
    assert np.abs(np.asarray(first).astype(int) - (10, 200, 30)).max() <= 4


def test_what_is_transparent_turns_white() -> None:
    assert open_picture(_encoded(Image.new("RGBA", (1, 1), (9, 9, 9, 0))), "x").getpixel(
        (0, 0)
    ) == (
        255,
        255,
        255,
    )


@pytest.mark.parametrize("size", [(PIXELS // 1000 + 1, 1000), (12_000, 9_000), (60_000, 60_000)])
def test_a_bomb_is_refused_from_its_header_without_a_warning(size: tuple[int, int]) -> None:
    # pytest makes a warning of Pillow's an error, which would not be this one
    with pytest.raises(MalformedError, match=r"50,000,000.*x \[3\]"):
        open_picture(_claims(*size), "x [3]")


def test_a_cut_a_foreign_and_a_missing_picture_are_refused(tmp_path: Path) -> None:
    whole = _encoded(Image.effect_noise((64, 64), 50).convert("RGB"))
    for bad in (whole[: len(whole) // 2], b"", b"%!PS-Adobe-3.0", whole[:30]):
        with pytest.raises(MalformedError, match="cannot be read"):
            open_picture(bad, "x [0]")
    with pytest.raises(MalformedError, match="no picture file"):
        open_picture(tmp_path / "none.png", "x [0]")


@pytest.mark.parametrize(("form", "image"), [("image", None), ("text", b"x"), ("natural", b"x")])
def test_only_the_form_image_has_a_picture_of_its_own(form: Form, image: bytes | None) -> None:
    with pytest.raises(UsageError, match=r"x \[7\]"):
        Sample("Name a tree", "harmless", form, "x", 7, image)
