"""From the sources a recipe names to the samples a stage works on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from guardbake.samples import Form, Label, Prompt, Sample
from guardbake.samples.digests import identity
from guardbake.samples.readers import read
from guardbake.samples.splits import take

DRAW_SEED = 0


def collect(
    sources: Sequence[str],
    label: Label,
    root: Path,
    limit: int | None,
    usable: Callable[[str], bool],
) -> list[Prompt]:
    """The usable prompts of all sources, each once, in the order of the sources.

    usable: whether the model can be shown words in every form; not asked for a prompt that comes
    with a picture. limit: at most so many, drawn by content, so that the draw does not depend on
    the order of a file.
    """
    seen: set[str] = set()
    prompts = []
    for source in sources:
        for prompt in read(source, root, label):
            key = identity(prompt)
            if key not in seen and (prompt.image is not None or usable(prompt.prompt)):
                seen.add(key)
                prompts.append(prompt)
    if limit is not None and limit < len(prompts):
        chosen = {identity(prompt) for prompt in take(prompts, limit, DRAW_SEED)}
        prompts = [prompt for prompt in prompts if identity(prompt) in chosen]
    return prompts


def in_forms(prompts: Sequence[Prompt], forms: Sequence[Form]) -> list[Sample]:
    """Every prompt in every form, form by form, so that a batch holds prompts of like length.

    A prompt that comes with a picture has the form "image" alone; these follow the others.
    """
    asked = [(p, form) for form in forms for p in prompts if p.image is None]
    asked += [(p, "image") for p in prompts if p.image is not None]
    return [
        Sample(p.prompt, p.label, form, p.source, p.index, p.image, p.family, p.goal)
        for p, form in asked
    ]
