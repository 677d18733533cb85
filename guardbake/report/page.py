"""One self-contained HTML page, and a Markdown model card, from the records of a bake.

The page is a jinja2 template with escaping on: every string of a record is text until the template
says otherwise, and it says so of plots alone, which `report.inline` serialises itself. There is no
script, no link and nothing to load, no date and no path: same records, same bytes.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from guardbake.bundle.folders import DiskFaults, beside, refuse_existing
from guardbake.errors import EnvironmentFault, UsageError
from guardbake.report.blocks import Block, Picture, Section
from guardbake.report.choice import choice, layers
from guardbake.report.claims import digests, not_claimed
from guardbake.report.markdown import to_markdown
from guardbake.report.outcome import agreed, behaved, evaluated, studied
from guardbake.report.records import Records, read_records

_TEMPLATE = "page.html.jinja"
_PARTIAL = ".guardbake-partial"


def write_report(folders: Sequence[Path], out: Path, card: Path | None) -> Records:
    """Write the page `out` and the card, if asked for; returns what was found.

    Each file appears whole or not at all, and nothing is overwritten. Raises UsageError for what
    is there already, EnvironmentFault without the extra [report], and as `read_records`.
    """
    targets = [out] if card is None else [out, card]
    if len({path.absolute() for path in targets}) < len(targets):
        raise UsageError(
            found="one name for page and card",
            expected="a name for each",
            where=str(out),
            remedy="give the card another name",
        )
    for path in targets:
        refuse_existing(path)
    found = read_records(folders)
    title, summary, sections = content(found)
    written = [to_html(title, summary, sections), to_markdown(title, summary, sections)]
    for path, text in zip(targets, written, strict=False):
        _write(path, text)
    return found


def content(found: Records) -> tuple[str, list[str], list[Section]]:
    """Title, what stands below it, and every section that the records allow."""
    sections = [
        choice(found.fit) if found.fit else None,
        layers(found.fit, found.diagnosis, found.plain.get("diagnosis", {})),
        evaluated(found.evaluation) if found.evaluation else None,
        behaved(found.behaviour) if found.behaviour else None,
        agreed(found.parity) if found.parity else None,
        *(studied(study, number) for number, study in enumerate(found.studies)),
        not_claimed(found),
        digests(found),
    ]
    summary = []
    if found.certificate is not None:
        by_status: dict[str, list[str]] = {}
        for gate in found.certificate.gates:
            shown = gate.name if gate.status == "pass" else f"{gate.name} ({gate.detail})"
            by_status.setdefault(gate.status, []).append(shown)
        seen = "; ".join(f"{status}: {', '.join(names)}" for status, names in by_status.items())
        summary.append(f"Certificate: {found.certificate.verdict}. Gates, {seen}.")
    if found.missing:
        names = ", ".join(f"{name}.json" for name in found.missing)
        summary.append(f"Not among the records: {names}.")
    return _title(found), summary, [section for section in sections if section is not None]


def _title(found: Records) -> str:
    if found.certificate is not None:
        return f"guardbake: {found.certificate.name}"
    return f"guardbake: {found.evaluation.recipe}" if found.evaluation else "guardbake: a guard"


def to_html(title: str, summary: Sequence[str], sections: Sequence[Section]) -> str:
    """The page. Raises EnvironmentFault without jinja2."""
    try:
        from jinja2 import Environment, StrictUndefined
        from markupsafe import Markup
    except ImportError as error:
        raise EnvironmentFault(
            found=f"no jinja2 ({error})",
            expected="jinja2, which writes the page",
            where="guardbake's extra [report]",
            remedy="pip install 'guardbake[report]'",
        ) from error

    def drawn(picture: Picture) -> Markup:
        return Markup(picture.svg)  # ours, serialised by report.inline

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, keep_trailing_newline=True
    )
    environment.globals |= {"kind": _kind, "drawn": drawn}
    source = resources.files("guardbake.report").joinpath(_TEMPLATE).read_text("utf-8")
    return environment.from_string(source).render(title=title, summary=summary, sections=sections)


def _kind(block: Block) -> str:
    return type(block).__name__


def _write(path: Path, text: str) -> None:
    with DiskFaults(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = beside(path, _PARTIAL)
        try:
            partial.write_text(text, encoding="utf-8")
            refuse_existing(path)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
