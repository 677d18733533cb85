"""The evaluation, told once: fit as a bake does, then ask every arm every family of prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from guardbake.bundle.folders import new_folder, refuse_existing
from guardbake.errors import RecipeError
from guardbake.evaluate.arms import Arm
from guardbake.evaluate.writeup import to_markdown
from guardbake.pipeline import CANDIDATES, Bake
from guardbake.progress import Reporter
from guardbake.steps.evaluate import Evaluation, arms_of
from guardbake.steps.fit import load_candidates
from guardbake.steps.records import write_record
from guardbake.steps.tuning import tuned_weights

EVALUATION, EVALUATION_TEXT = "evaluation.json", "EVALUATION.md"


def evaluate(recipe_path: Path, out: Path, reporter: Reporter) -> dict[str, Any]:
    """Ask every arm every family of prompts and write `out`, a folder; returns what it holds.

    Each cell is a stage, so that a run that was cut goes on. Raises UsageError if `out` exists,
    RecipeError if the recipe has no section evaluate, and whatever a stage raises.
    """
    refuse_existing(out)
    work = Bake(recipe_path, out, reporter)
    arms = fitted_arms(work)
    content = Evaluation(
        work.vlm,
        work.recipe,
        recipe_path.parent,
        work.splits,
        work.typography,
        arms,
        work,
        reporter.advance,
    ).run()
    with new_folder(out) as folder:
        write_record(folder / EVALUATION, content)
        (folder / EVALUATION_TEXT).write_text(to_markdown(content), encoding="utf-8")
    return content


def fitted_arms(work: Bake) -> list[Arm]:
    """Every row of the recipe's table, fitted as a bake fits; raises as `evaluate`."""
    section = work.recipe.evaluate
    if section is None:
        raise RecipeError(
            found="no section evaluate",
            expected="what to ask and of which arms",
            where=str(work.recipe_path),
            remedy="add the section, see models/demo.toml",
        )
    fitted, spec = work.fit()
    tuned = tuned_weights(
        work.vlm, work.recipe, work.splits, work.typography, work, work.reporter.advance
    )
    candidates = load_candidates(fitted / CANDIDATES) | work.rivals(spec)
    return arms_of(section, spec, candidates, tuned)
