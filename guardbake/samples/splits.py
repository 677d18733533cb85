"""Splits that are proved disjoint, and a draw that does not depend on the order of a file.

A number measured on prompts that the guard was fitted on says nothing. So before anything is fitted
every split is compared with every other by the digest of its normalised requests, and the digests
of the splits go into the manifest. An attack is compared by the plain request inside it: the same
request in another wrapping, or out of another benchmark, is still the same request.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path

from guardbake.errors import RecipeError
from guardbake.samples.readers import Prompt


def normalised(text: str) -> str:
    """Words of letters and digits, case folded, single spaces: "Don't  SHOUT!" -> "don t shout"."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(re.findall(r"[^\W_]+", folded))


def digest(text: str) -> str:
    """sha256 in hex of the normalised text."""
    return hashlib.sha256(normalised(text).encode()).hexdigest()


def identity(prompt: Prompt) -> str:
    """Digest in hex of one prompt as it is asked: of its words or, with a picture, also of that.

    A picture counts by its file's name and the attack's family, and by content where it has no
    file. So a draw is the same wherever a benchmark's folder lies, and opens no picture.
    """
    words = digest(prompt.prompt)
    if prompt.image is None:
        return words
    picture = prompt.image.name.encode() if isinstance(prompt.image, Path) else prompt.image
    shown = hashlib.sha256(picture).hexdigest()
    return hashlib.sha256(f"{words} {prompt.family} {shown}".encode()).hexdigest()


def prove_disjoint(splits: Mapping[str, Sequence[Prompt]]) -> dict[str, str]:
    """Digest in hex of every split, after showing that no request stands in two of them.

    Requests are compared by `Prompt.goal`, the plain one inside an attack. The digest of a split
    covers the set of the identities of its prompts and their labels; order and repetition do not
    change it. Raises RecipeError naming split, source and index of both places,
    never the prompt; also for an empty split and for a prompt without a letter or digit.
    """
    owner: dict[str, tuple[str, Prompt]] = {}
    digests: dict[str, str] = {}
    for name, prompts in splits.items():
        if not prompts:
            raise RecipeError(
                found="no prompt",
                expected="at least one",
                where=f"split {name!r}",
                remedy="give the split a source, or drop it",
            )
        members = set()
        for prompt in prompts:
            key = _key(name, prompt)
            other, first = owner.setdefault(key, (name, prompt))
            if other != name:
                raise _overlap(name, prompt, other, first)
            members.add(f"{prompt.label} {identity(prompt)}\n")
        digests[name] = hashlib.sha256("".join(sorted(members)).encode()).hexdigest()
    return digests


def take(prompts: Sequence[Prompt], n: int, seed: int) -> list[Prompt]:
    """`n` distinct prompts, the same for the same set and seed whatever the order of the set.

    Prompts of the same `identity` count once. Result in order of the draw, so that
    take(p, 10, s) begins take(p, 20, s). Raises RecipeError if there are fewer than n.
    """
    unique = {identity(prompt): prompt for prompt in reversed(prompts)}
    if not 0 < n <= len(unique):
        raise RecipeError(
            found=f"{len(unique)} different prompts for a draw of {n}",
            expected="a draw between 1 and the number of different prompts",
            where=", ".join(sorted({prompt.source for prompt in prompts})) or "an empty list",
            remedy="draw fewer, or add a source",
        )
    order = sorted(unique, key=lambda key: hashlib.sha256(f"{seed}:{key}".encode()).digest())
    return [unique[key] for key in order[:n]]


def _key(name: str, prompt: Prompt) -> str:
    request = prompt.goal or prompt.prompt
    if not normalised(request):
        raise RecipeError(
            found="a prompt without a letter or digit",
            expected="words",
            where=f"split {name!r}, {prompt.source} [{prompt.index}]",
            remedy="remove the prompt",
        )
    return digest(request)


def _overlap(name: str, prompt: Prompt, other: str, first: Prompt) -> RecipeError:
    return RecipeError(
        found=f"one prompt in two splits, {other!r} and {name!r}",
        expected="splits that share no prompt",
        where=f"{first.source} [{first.index}] and {prompt.source} [{prompt.index}]",
        remedy="remove it from one of the two",
    )
