"""One study: measured, said in words, drawn, and published as a folder that appears whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from guardbake.bundle.folders import new_folder, refuse_existing
from guardbake.pipeline import Bake
from guardbake.progress import Reporter
from guardbake.report.blocks import Grid
from guardbake.report.markdown import plain, to_lines
from guardbake.report.plots import Plot, draw, require_matplotlib
from guardbake.steps.records import write_record
from guardbake.studies import StudyName
from guardbake.studies.anchors import ANCHORS
from guardbake.studies.blank_image import BLANK_IMAGE
from guardbake.studies.boundary import BOUNDARY
from guardbake.studies.layers import LAYERS
from guardbake.studies.lookalikes import LOOKALIKES
from guardbake.studies.modality import MODALITY
from guardbake.studies.scan import SCAN
from guardbake.studies.setting import Setting, Study

STUDY, STUDY_TEXT = "study.json", "STUDY.md"
STUDIES: Mapping[StudyName, Study] = {
    StudyName.blank_image: BLANK_IMAGE,
    StudyName.layers: LAYERS,
    StudyName.scan: SCAN,
    StudyName.anchors: ANCHORS,
    StudyName.lookalikes: LOOKALIKES,
    StudyName.boundary: BOUNDARY,
    StudyName.modality: MODALITY,
}


def study(name: StudyName, recipe: Path, out: Path, reporter: Reporter) -> dict[str, Any]:
    """Write `out`: study.json, its plots and STUDY.md; returns what study.json holds.

    Raises UsageError if `out` exists, EnvironmentFault without matplotlib, and what a stage raises;
    run again, it goes on at the cell that was cut.
    """
    refuse_existing(out)
    require_matplotlib()
    setting = Setting(Bake(recipe, out, reporter))
    one = STUDIES[name]
    figures = one.measure(setting)
    table, plots = one.table(figures), one.plots(figures)
    content = {
        "study": name.value,
        "question": one.question,
        "recipe": setting.bake.recipe.name,
        "model": setting.bake.vlm.model_digest,
        "samples": dict(setting.bake.splits.digests),
        "section": setting.section.model_dump(mode="json"),
        "figures": figures,
        "finding": one.finding(figures),
        "table": asdict(table),
        "plots": [asdict(plot) for plot in plots],
    }
    with new_folder(out) as folder:
        write_record(folder / STUDY, content)
        for plot in plots:
            draw(folder / f"{plot.name}.svg", plot)
        text = to_markdown(content, table, plots)
        (folder / STUDY_TEXT).write_text(text, encoding="utf-8")
    return content


def to_markdown(content: Mapping[str, Any], table: Grid, plots: Sequence[Plot]) -> str:
    """The question, the finding, the figures behind it, and what it stands on."""
    lines = [
        f"# Study: {content['study']}",
        "",
        content["question"],
        "",
        "## Finding",
        "",
        *(line for sentence in content["finding"] for line in (plain(sentence), "")),
        "One model, one recipe. Answers are judged by keywords, greedy; what is not refused is not "
        "thereby a working harmful answer.",
        "",
        *(line for p in plots for line in (f"![{p.name}]({p.name}.svg)", "")),
        "## Figures",
        "",
        *to_lines(table),
        "",
        f"- recipe: {content['recipe']}, seed {content['section']['seed']}",
        f"- model: `{content['model']}`",
        *(f"- {name} split: `{digest}`" for name, digest in content["samples"].items()),
    ]
    return "\n".join(lines) + "\n"
