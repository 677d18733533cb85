"""The columns that PGD makes: images found batch by batch, each batch a stage of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from guardbake.bundle.canonical import JSON
from guardbake.errors import RecipeError
from guardbake.evaluate.arms import UNDEFENDED, Arm
from guardbake.evaluate.attacks.found import Found, Target, attack, load_found, save_found
from guardbake.evaluate.attacks.pgd import Budget, Bytes
from guardbake.evaluate.attacks.wrappers import Pictured
from guardbake.recipe import Recipe
from guardbake.recipe_evaluate import PgdSection
from guardbake.samples import Prompt, Sample
from guardbake.samples.collect import collect, in_forms
from guardbake.steps.families import Column, drawn
from guardbake.steps.split import Splits
from guardbake.steps.staging import Advance, Stages
from guardbake.vlm.load import Vlm
from guardbake.vlm.pixels import as_seen
from guardbake.vlm.requests import Asking, Typography

OWN, UNIVERSAL, TOXIC, ADAPTIVE = "PGD", "universal PGD", "toxic PGD", "adaptive PGD"
_IMAGES = {
    OWN: "each its own image",
    UNIVERSAL: "one image for all",
    TOXIC: "one toxic image for all",
}
_FILE = "attack.safetensors"


class Searches:
    """Every image search of one evaluation, and what each found."""

    def __init__(
        self,
        vlm: Vlm,
        recipe: Recipe,
        splits: Splits,
        root: Path,
        typography: Typography,
        stages: Stages,
        advance: Advance,
    ) -> None:
        """root: what the sources of the recipe are relative to."""
        assert recipe.evaluate is not None
        self._vlm = vlm
        self._turns = recipe.fit.compliant
        self._section = recipe.evaluate.pgd
        self._splits = splits
        self._root = root
        self._typography = typography
        self._stages = stages
        self._advance = advance
        self._found: list[dict[str, Any]] = []

    def columns(self) -> list[Column]:
        """One a bound and kind, harmful prompts alone; the searches run when they are asked."""
        section = self._section
        if section is None:
            return []
        samples = self._samples("test", section.limit, section)
        kinds: list[tuple[str, Sequence[int], Callable[..., Asking]]] = [
            (OWN, section.eps, self._transferred),
            (UNIVERSAL, section.universal, self._universal),
            (TOXIC, section.toxic, self._toxic),
            (ADAPTIVE, section.adaptive, self._adaptive),
        ]
        return [
            Column(
                "harmful",
                f"{kind} {eps}/255",
                samples,
                partial(make, section, eps, samples),
                adaptive=kind == ADAPTIVE,
                through=section.through if kind == ADAPTIVE else (),
            )
            for kind, bounds, make in kinds
            for eps in bounds
        ]

    def report(self) -> list[dict[str, Any]]:
        """What each search found, in order, one entry a kind, bound and arm."""
        return self._found

    # -- kinds -------------------------------------------------------------------------------

    def _transferred(
        self, section: PgdSection, eps: int, samples: Sequence[Sample], _arm: Arm
    ) -> Asking:
        """Found on the undefended model, whichever arm is asked."""
        return self._adaptive(section, eps, samples, Arm(UNDEFENDED))

    def _adaptive(
        self, section: PgdSection, eps: int, samples: Sequence[Sample], arm: Arm
    ) -> Asking:
        """Found through the arm that is asked."""
        pictures: dict[tuple[str, int], Bytes] = {}
        parts = []
        for start in range(0, len(samples), section.batch_size):
            some = samples[start : start + section.batch_size]
            found = self._search(OWN, arm, some, start, eps, section, self._turns)
            parts.append(found)
            pictures |= {
                (s.source, s.index): image for s, image in zip(some, found.images, strict=True)
            }
        self._note(_IMAGES[OWN], arm, eps, parts)
        return Pictured(self._typography, pictures)

    def _universal(
        self, section: PgdSection, eps: int, samples: Sequence[Sample], _arm: Arm
    ) -> Asking:
        """One image for all, found on prompts of the fit split and the undefended model."""
        return self._for_all(UNIVERSAL, section, eps, samples, self._turns)

    def _toxic(self, section: PgdSection, eps: int, samples: Sequence[Sample], _arm: Arm) -> Asking:
        """The same, calling for toxic words."""
        assert section.toxic_turns is not None
        source = [section.toxic_turns]
        prompts = collect(source, "harmful", self._root, section.corpus, lambda _: True)
        turns = [prompt.prompt for prompt in prompts]
        return self._for_all(TOXIC, section, eps, samples, turns)

    def _for_all(
        self,
        kind: str,
        section: PgdSection,
        eps: int,
        samples: Sequence[Sample],
        turns: Sequence[str],
    ) -> Asking:
        corpus = self._samples("fit", section.corpus, section)
        found = self._search(kind, Arm(UNDEFENDED), corpus, 0, eps, section, turns)
        self._note(_IMAGES[kind], Arm(UNDEFENDED), eps, [found])
        pictures = {(s.source, s.index): found.images[0] for s in samples}
        return Pictured(self._typography, pictures)

    # -- one batch ---------------------------------------------------------------------------

    def _search(
        self,
        kind: str,
        arm: Arm,
        samples: Sequence[Sample],
        start: int,
        eps: int,
        section: PgdSection,
        wanted: Sequence[str],
    ) -> Found:
        """start: the place of the first sample, by which the wanted turns are dealt out."""
        asking, tokenizer = arm.asking(self._typography), self._vlm.processor.tokenizer
        requests = [asking.request(sample, tokenizer) for sample in samples]
        clean = as_seen(self._vlm, [image for _, image in requests if image is not None])
        turns = [wanted[(start + n) % len(wanted)] for n in range(len(samples))]
        texts = [text for text, _ in requests]
        target = Target(arm, texts, np.stack(clean), turns, universal=kind != OWN)
        budget = Budget(eps, section.steps, section.step, section.seed)
        key: dict[str, JSON] = {
            **target.key(self._vlm, budget),
            **self._stages.versions("attack"),
        }
        what = f"{kind} {eps}/255 on {arm.name}, from {start}"

        def build(folder: Path) -> None:
            ticks = iter(range(1, section.steps + 1))

            def tick() -> None:
                self._advance(what, next(ticks), section.steps)

            save_found(attack(self._vlm, target, budget, tick), folder / _FILE)

        return load_found(self._stages.stage("attack", key, build) / _FILE)

    def _samples(self, split: str, limit: int, section: PgdSection) -> list[Sample]:
        prompts: list[Prompt] = drawn(self._splits.prompts[split], "harmful", limit)
        if not prompts:
            raise RecipeError(
                found=f"no plain harmful prompt in samples.{split}",
                expected="prompts beside which an image can be searched",
                where="section evaluate.pgd",
                remedy="add a source of plain prompts",
            )
        return in_forms(prompts, (section.base,))

    def _note(self, kind: str, arm: Arm, eps: int, parts: Sequence[Found]) -> None:
        """Counts and means of a search, once."""
        before, after, scores, later = (
            np.concatenate([getattr(part, name) for part in parts])
            for name in ("before", "after", "score_before", "score_after")
        )
        gated = bool(np.isfinite(scores).all())
        entry: dict[str, Any] = {
            "kind": kind,
            "arm": arm.name,
            "eps": eps,
            "prompts": len(before),
            "surprise_before": float(before.mean()),
            "surprise_after": float(after.mean()),
            "open_before": int((scores > 0).sum()) if gated else None,
            "open_after": int((later > 0).sum()) if gated else None,
        }
        if entry not in self._found:
            self._found.append(entry)
