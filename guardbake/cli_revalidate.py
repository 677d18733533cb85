"""`guardbake revalidate`: parsing and printing only."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

import typer

from guardbake.cli_options import Out, ProgressOption, ProgressStyle
from guardbake.errors import UsageError
from guardbake.progress import reporter_for

if TYPE_CHECKING:
    from guardbake.pipeline import Bake
    from guardbake.steps.revalidate import Calibration

Source = Annotated[
    Path, typer.Argument(help="A folder with an unguarded decoder, quantised or cast.")
]
Guard = Annotated[Path, typer.Option("--guard", help="The guard pack, fitted on the float model.")]
RecipeOption = Annotated[
    Path, typer.Option("--recipe", help="Of the guard: its checkpoint, its validation prompts.")
]
Loss = Annotated[
    float,
    typer.Option(
        min=0.0,
        max=1.0,
        help="Share of harmful prompts of a form that may open a gate on the float model and not "
        "on this one.",
    ),
]


def revalidate(
    source: Source,
    guard: Guard,
    recipe: RecipeOption,
    out: Out,
    loss: Loss = 0.05,
    progress: ProgressOption = ProgressStyle.auto,
) -> None:
    """As apply, with the guard's thresholds set anew on what its sensors read in this decoder.

    Asks the prompts that they were first set on, one at a time, in onnxruntime, at the same
    false-positive rate. Prints how far scores moved and what opens before and after.
    """
    from guardbake.artifact import save_guard
    from guardbake.bundle.folders import refuse_existing
    from guardbake.bundle.manifest import GUARD
    from guardbake.pipeline import Bake
    from guardbake.steps.apply import apply_guard
    from guardbake.steps.revalidate import revalidate as set_anew
    from guardbake.steps.self_check import require_session

    refuse_existing(out)
    session = require_session()
    reporter = reporter_for(progress.value)
    calibration = _calibration(Bake(recipe, out, reporter), recipe, loss)
    spec, record = set_anew(source, guard, calibration, session, reporter.advance)
    with TemporaryDirectory() as folder:
        pack = Path(folder) / GUARD
        save_guard(spec, pack)
        applied = apply_guard(source, pack, out, "link", session=session, revalidation=record)
    for gate, figures in enumerate(record["gates"]):
        print("\n".join(_lines(gate, figures)))
    print(f"guard {spec.digest[:12]}, for {applied['runtime']}: {out}")


def _calibration(bake: Bake, recipe: Path, loss: float) -> Calibration:
    from guardbake.samples import SENSED
    from guardbake.steps.revalidate import Calibration

    sensor = bake.recipe.fit.sensor
    if sensor is None:
        raise UsageError(
            found="no [fit.sensor], and so no rate that a threshold keeps",
            expected="the recipe that the guard was fitted by",
            where=str(recipe),
            remedy="name it, or use guardbake apply for a guard without a gate",
        )
    return Calibration(
        bake.vlm,
        bake.typography,
        bake.recipe.batch_size,
        bake.splits.samples("calibrate", SENSED),
        bake.splits.digests["calibrate"],
        sensor.false_positive_rate,
        loss,
    )


def _lines(gate: int, figures: dict[str, Any]) -> list[str]:
    """How far scores moved, and the share of prompts that opens: fitted on, before and after."""
    limits = figures["thresholds"]
    before, after = (", ".join(f"{t:.4g}" for t in limits[when]) for when in ("before", "after"))
    lines = [f"gate {gate}: thresholds {before} -> {after}"]
    for form, shift in figures["forms"].items():
        moved = shift["shift"]
        opened = [
            f"{label} {rates['reference']:.3f} / {rates['before']:.3f} / {rates['after']:.3f}"
            for label, rates in (
                ("harmful", shift["harmful_open"]),
                ("harmless", shift["harmless_open"]),
            )
        ]
        lines.append(
            f"  {form:<12} scores {moved['mean']:+.3f} (at most {moved['largest']:.3f} apart); "
            f"opens float / before / after: {', '.join(opened)}"
        )
    return lines
