"""The refusal fine-tune that an evaluation may hold guards against: trained once, a stage."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from guardbake.bundle.canonical import JSON
from guardbake.recipe import Recipe
from guardbake.steps.exchanges import exchanges
from guardbake.steps.fit import FIT_FORMS
from guardbake.steps.split import Splits
from guardbake.steps.staging import Advance, Stages
from guardbake.vlm.load import Vlm
from guardbake.vlm.low_rank import LowRank, Tuning, load_low_rank, save_low_rank, tune
from guardbake.vlm.requests import Typography

_FILE = "change.safetensors"


def tuned_weights(
    vlm: Vlm,
    recipe: Recipe,
    splits: Splits,
    typography: Typography,
    stages: Stages,
    advance: Advance,
) -> LowRank | None:
    """What the section evaluate.tuning asks for, from the fit split alone; None without it."""
    section = None if recipe.evaluate is None else recipe.evaluate.tuning
    if section is None:
        return None
    key: dict[str, JSON] = {
        "model": vlm.model_digest,
        "samples": splits.digests["fit"],
        "tuning": section.model_dump(mode="json"),
        "turns": {"refusing": recipe.fit.refusing, "compliant": recipe.fit.compliant},
        "tokens": recipe.fit.tokens,
        "typography": recipe.samples.typography.model_dump(mode="json"),
        **stages.versions("tuning"),
    }

    def build(folder: Path) -> None:
        samples = splits.samples("fit", FIT_FORMS)
        size = recipe.batch_size
        pairs = exchanges(vlm, recipe.fit, samples, section.pairs, typography, size, advance)
        tuning = Tuning(section.rank, section.steps, section.batch_size, section.rate, section.seed)
        change = tune(vlm, pairs, typography, tuning, partial(advance, "refusal fine-tune"))
        save_low_rank(change, folder / _FILE)

    return load_low_rank(stages.stage("tuning", key, build) / _FILE)
