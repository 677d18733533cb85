"""What a report does not claim, read off what the records lack; and the digests it stands on."""

from __future__ import annotations

from guardbake.report.blocks import Grid, Items, Section
from guardbake.report.records import Records
from guardbake.report.schema import Table

_FEW = 100  # prompts below which a rate's interval is wider than 0.2 at its middle


def not_claimed(found: Records) -> Section:
    """Every limit that the records themselves show."""
    lines = [
        "One model. What the guard does to another one, or to a larger one, is not known from this."
    ]
    measured = found.evaluation or found.behaviour
    if measured is not None:
        lines += _of_table(measured.table)
        others = [judge.name for judge in found.evaluation.judges] if found.evaluation else []
        beside = f"beside it: {', '.join(others)}" if others else "no other judge stands beside it"
        lines.append(
            f"A keyword judge counts refusals; {beside}. What is not refused is not thereby a "
            "working harmful answer, and a refusal that goes on to answer is counted as one."
        )
    else:
        lines.append("Nothing is said of behaviour: no evaluation and no behaviour record is here.")
    if found.evaluation is None:
        lines.append("No rival stands beside the guard, and nothing was attacked by search.")
    else:
        lines += _of_searches(found)
    if found.parity is None:
        lines.append("That an exported graph computes this guard is not shown: no parity record.")
    if found.certificate is None:
        lines.append("Nothing is certified: no certificate is here.")
    elif found.certificate.verdict != "pass":
        lines.append("Nothing is certified: the certificate's own verdict is not pass.")
    if found.certificate and isinstance(found.certificate.figures.get("engine"), dict):
        lines.append("An engine was compiled; that it ran is not recorded.")
    else:
        lines.append("No engine is recorded.")
    return Section("What is not claimed", [Items(lines)])


def _of_table(table: Table) -> list[str]:
    lines = []
    least = min(row.refused.total for row in table.rows)
    if least < _FEW:
        lines.append(f"Some cells hold {least} prompts; their intervals are as wide as they say.")
    if not any(row.sampled for row in table.rows):
        lines.append("Only greedy answers were judged: no sampled seeds.")
    return lines


def _of_searches(found: Records) -> list[str]:
    assert found.evaluation is not None
    families = {row.family for row in found.evaluation.table.rows if row.label == "harmful"}
    seen = {*found.evaluation.fitted_on, *found.evaluation.validated_on}
    lines = []
    if not any(family.startswith("adaptive") for family in families):
        lines.append("No attack was optimised against the guard itself.")
    if not families - seen:
        lines.append("Every attack family was seen in fitting or in choosing: none was held out.")
    if not found.evaluation.settings.seeds:
        return lines
    if len(found.evaluation.settings.seeds) < 3:
        lines.append("Fewer than three sampled seeds: how much answers vary is hardly known.")
    return lines


def digests(found: Records) -> Section:
    """Of the model, the guard, the graphs, the splits and the records themselves."""
    rows: dict[str, str] = {}
    if found.diagnosis is not None:
        rows |= {"model": found.diagnosis.model, "samples, fit": found.diagnosis.samples}
    if found.evaluation is not None:
        rows["model"] = found.evaluation.model
        rows |= {f"samples, {name}": value for name, value in found.evaluation.samples.items()}
        rows |= {f"guard of {a.name}": a.guard for a in found.evaluation.arms if a.guard}
    if found.certificate is not None:
        own = found.certificate.digests
        rows |= {"model": own.model, "guard": own.guard, **own.onnx}
    rows |= {f"record, {name}": value for name, value in found.origin.items()}
    rows |= {f"record, {name}": "not here" for name in found.missing}
    return Section(
        "Digests", [Grid("sha256 in hexadecimal.", ("of", "digest"), list(rows.items()))]
    )
