"""The columns of an evaluation that need no search: who is asked what, and in which form.

===============  ===============================================================================
text             the request in words
blank, natural   the words beside a white picture, or one with the statistics of a photograph
photograph       the words beside a crop of one of the user's photographs
typographic      the request drawn into the picture (FigStep's style)
templates        the words inside a jailbreak template, one column a family of templates
published        prompts that came with a picture or an attack of their own, one column an attack
===============  ===============================================================================
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from guardbake.errors import RecipeError
from guardbake.evaluate.arms import UNDEFENDED, Arm
from guardbake.evaluate.attacks.wrappers import (
    Photographed,
    Templated,
    photographs,
    read_templates,
)
from guardbake.evaluate.table import LABELS
from guardbake.recipe_evaluate import AttackFamily, EvaluateSection
from guardbake.samples import Form, Label, Prompt, Sample
from guardbake.samples.collect import in_forms
from guardbake.samples.splits import take
from guardbake.vlm.requests import Asking, Typography

DRAW_SEED = 1  # not the split's own, or a limit here would take that draw's first prompts


@dataclass(frozen=True, eq=False)
class Column:
    """Prompts of one label, asked in one way, or if adaptive each arm in its own way.

    through: names of the arms that are asked, beside the undefended model; none named: all.
    sampled: whether the recipe's sampled runs are asked for, too.
    """

    label: Label
    family: str
    samples: Sequence[Sample]
    asking: Callable[[Arm], Asking]
    adaptive: bool = False
    through: Sequence[str] = ()
    sampled: bool = True

    def asks(self, arm: Arm) -> bool:
        return not self.through or arm.name in (UNDEFENDED, *self.through)

    @property
    def prompts(self) -> list[tuple[str, int]]:
        return [(sample.source, sample.index) for sample in self.samples]


def drawn(prompts: Sequence[Prompt], label: Label, limit: int) -> list[Prompt]:
    """At most `limit` plain prompts of the label, drawn by content."""
    plain = [p for p in prompts if p.label == label and not is_published(p)]
    return take(plain, min(limit, len(plain)), DRAW_SEED) if plain else []


def is_published(prompt: Prompt) -> bool:
    return prompt.image is not None or bool(prompt.family)


def columns(
    section: EvaluateSection,
    prompts: Sequence[Prompt],
    typography: Typography,
    root: Path,
    imageless: bool = True,
) -> list[Column]:
    """Every column of the recipe but those that PGD makes, harmful ones first.

    prompts: the test split. imageless: whether the model can be asked in words alone. Raises
    RecipeError for a family that no prompt belongs to, and for words alone that cannot be asked.
    """
    alone = sorted({"text", "templates"} & {*section.attacks, *section.benign})
    if alone and not imageless:
        raise RecipeError(
            found=f"{' and '.join(alone)}, words alone",
            expected="families with a picture: the model is never asked without one",
            where="section evaluate",
            remedy='name "blank" in the place of "text", and leave "templates" out',
        )
    out: list[Column] = []
    for label in LABELS:
        odd = section.lookalikes if label == "harmless" else []
        rest = drawn([p for p in prompts if p.source not in odd], label, section.limit)
        apart = drawn([p for p in prompts if p.source in odd], label, section.limit)
        for family in section.attacks if label == "harmful" else section.benign:
            if family == "published":
                out += _published(prompts, label, typography, section.limit)
                continue
            askings = _askings(family, section, typography, root)
            for kind, some in (("", rest), ("look-alike ", apart)):
                out += [
                    _column(label, kind + n, some, f, a) for n, (f, a) in askings.items() if some
                ]
    _demand(out, section)
    return out


def _askings(
    family: AttackFamily, section: EvaluateSection, typography: Typography, root: Path
) -> Mapping[str, tuple[Form, Asking]]:
    """By column: the form of its samples and how they are asked."""
    if family == "templates":
        assert section.templates is not None
        found = read_templates(root / section.templates)
        return {name: ("text", Templated(typography, texts)) for name, texts in found.items()}
    if family == "photograph":
        assert section.photographs is not None
        return {family: ("text", Photographed(typography, photographs(root / section.photographs)))}
    assert family != "published"
    return {family: (family, typography)}


def _published(
    prompts: Sequence[Prompt], label: Label, typography: Typography, limit: int
) -> list[Column]:
    groups: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        if prompt.label == label and is_published(prompt):
            groups.setdefault(prompt.family or "with a picture", []).append(prompt)
    return [
        _column(label, name, take(some, min(limit, len(some)), DRAW_SEED), "text", typography)
        for name, some in sorted(groups.items())
    ]


def _column(
    label: Label, family: str, prompts: Sequence[Prompt], form: Form, asking: Asking
) -> Column:
    return Column(label, family, in_forms(prompts, (form,)), lambda _arm: asking)


def _demand(found: Sequence[Column], section: EvaluateSection) -> None:
    """Each label needs a column, each named source of look-alikes a prompt."""
    labels = {column.label for column in found}
    sources = {sample.source for column in found for sample in column.samples}
    missing = sorted({"harmful", "harmless"} - labels)
    missing += [source for source in section.lookalikes if source not in sources]
    if ("published" in section.attacks) and not any(
        sample.family or sample.image for column in found for sample in column.samples
    ):
        missing.append("published")
    if missing:
        raise RecipeError(
            found=f"no prompt for {', '.join(missing)}",
            expected="prompts of every family in the test split",
            where="section evaluate",
            remedy="add sources to samples.test, or leave the family out",
        )
