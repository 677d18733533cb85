"""Digests of prompts: what makes two of them the same."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from pathlib import Path

from guardbake.samples import Prompt


def normalised(text: str) -> str:
    """Words of letters and digits, case folded, single spaces: "Don't  SHOUT!" -> "don t shout"."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(re.findall(r"[^\W_]+", folded))


def digest(text: str) -> str:
    """sha256 in hex of the normalised text."""
    return hashlib.sha256(normalised(text).encode()).hexdigest()


def identity(prompt: Prompt) -> str:
    """Digest in hex of one prompt as it is asked: of its words or, with a picture, also of that.

    A picture counts by its file's name, the request in it and the attack's family, and by content
    where it has no file. So a draw is the same wherever a folder lies, and opens no picture.
    """
    words = digest(prompt.prompt)
    if prompt.image is None:
        return words
    picture = prompt.image.name.encode() if isinstance(prompt.image, Path) else prompt.image
    shown = hashlib.sha256(picture).hexdigest()
    whole = f"{words} {digest(prompt.request)} {prompt.family} {shown}"
    return hashlib.sha256(whole.encode()).hexdigest()
