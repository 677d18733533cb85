"""Pictures that come with a prompt: opened within a bound, never trusted."""

from __future__ import annotations

import struct
import warnings
from io import BytesIO

from PIL import Image

from guardbake.errors import MalformedError
from guardbake.samples import Picture

PIXELS = 50_000_000
"""The most pixels a picture may have, width times height; a few kilobytes can claim billions."""
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "WEBP")


def open_picture(picture: Picture, where: str) -> Image.Image:
    """The picture in RGB, of its own size; transparent parts on white, of an animation frame 0.

    The size is read from the header and refused before a pixel is decoded. where: source and index,
    for the error. Raises MalformedError for a picture that is missing, is of no format of FORMATS,
    is cut, or has more than PIXELS pixels.
    """
    file = BytesIO(picture) if isinstance(picture, bytes) else picture
    try:
        with warnings.catch_warnings():
            # Pillow only warns below twice its own bound, which is larger than ours
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(file, formats=FORMATS) as opened:
                if opened.width * opened.height > PIXELS:
                    raise Image.DecompressionBombError
                return _on_white(opened)
    except Image.DecompressionBombError:
        raise _refuse("a picture of more pixels than that", where) from None
    except FileNotFoundError:
        raise _refuse("no picture file", where) from None
    except (OSError, SyntaxError, ValueError, EOFError, struct.error) as error:
        raise _refuse(f"a picture that cannot be read ({type(error).__name__})", where) from error


def _on_white(opened: Image.Image) -> Image.Image:
    if not opened.has_transparency_data:
        return opened.convert("RGB")
    ground = Image.new("RGBA", opened.size, "white")
    return Image.alpha_composite(ground, opened.convert("RGBA")).convert("RGB")


def _refuse(found: str, where: str) -> MalformedError:
    return MalformedError(
        found=found,
        expected=f"{', '.join(FORMATS)} of at most {PIXELS:,} pixels",
        where=where,
        remedy="fetch the picture again, or leave the prompt out",
    )
