"""Splits that are proved disjoint, and a draw that does not depend on the order of a file.

A number measured on prompts that the guard was fitted on says nothing. So before anything is fitted
every split is compared with every other by the digest of its normalised requests, and the digests
of the splits go into the manifest. An attack is compared by the plain request inside it: the same
request in another wrapping, or out of another benchmark, is still the same request.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

from guardbake.errors import RecipeError
from guardbake.samples import Prompt
from guardbake.samples.digests import digest, identity, normalised


def prove_disjoint(splits: Mapping[str, Sequence[Prompt]]) -> dict[str, str]:
    """Digest in hex of every split, after showing that no request stands in two of them.

    Compared is `Prompt.request`, the plain one inside an attack. The digest of a split covers the
    set of the identities of its prompts and their labels; order and repetition do not change it.
    Raises RecipeError naming split, source and index of both places, never the prompt; also for an
    empty split and for a prompt without a letter or digit.
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


def prove_held_out(families: Sequence[str], splits: Mapping[str, Sequence[Prompt]]) -> None:
    """Show that no prompt of these attack families stands in any split but "test", where some do.

    A family covers what is below it: "jailbreakv" also "jailbreakv/Template". Raises RecipeError
    naming source and index of the first prompt, or the family that the test lacks.
    """
    for family in families:

        def held(prompt: Prompt, family: str = family) -> bool:
            return f"{prompt.family}/".startswith(f"{family}/")

        for name, prompts in splits.items():
            found = [prompt for prompt in prompts if held(prompt)]
            if found and name != "test":
                raise RecipeError(
                    found=f"{len(found)} prompts of the held-out family {family!r}",
                    expected="none outside the test split",
                    where=f"split {name!r}, {found[0].source} [{found[0].index}]",
                    remedy="take the source out of this split, or do not hold the family out",
                )
            if not found and name == "test":
                raise RecipeError(
                    found=f"no prompt of the held-out family {family!r}",
                    expected="the family that is held out in the test split",
                    where="split 'test'",
                    remedy="add a source of this family, or correct its name",
                )


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
    if not normalised(prompt.request):
        raise RecipeError(
            found="a prompt without a letter or digit",
            expected="words",
            where=f"split {name!r}, {prompt.source} [{prompt.index}]",
            remedy="remove the prompt",
        )
    return digest(prompt.request)


def _overlap(name: str, prompt: Prompt, other: str, first: Prompt) -> RecipeError:
    return RecipeError(
        found=f"one prompt in two splits, {other!r} and {name!r}",
        expected="splits that share no prompt",
        where=f"{first.source} [{first.index}] and {prompt.source} [{prompt.index}]",
        remedy="remove it from one of the two",
    )
