"""A diagnosis for people: the curves as SVG files, the rule and the choice in Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from guardbake.report.plots import Curve, draw_curves

_PARTS = {"ffn": "FFN", "attention": "attention", "layer": "whole layer", "pair": "pair [l, l+1]"}
_COMPONENTS = {
    "ffn_output": "FFN output",
    "attention_output": "attention output",
    "residual": "residual",
}
_MEASURES = {
    "mahalanobis": "Mahalanobis distance",
    "silhouette": "silhouette",
    "scatter_ratio": "between / within scatter",
    "auc": "AUC of the text direction",
}
Content = Mapping[str, Any]
Effects = Sequence[Content]


def draw_diagnosis(content: Content, folder: Path) -> list[str]:
    """Write the plots of a diagnosis into `folder`; their names, in the order of a reader.

    Raises EnvironmentFault without matplotlib.
    """
    chosen = content["choice"]["layers"]
    names = []
    for kind in content["section"]["kinds"]:
        for curve, y_label in (("cause", f"drop of refusal score, {kind}"), _attack_label(kind)):
            panels = _panels(content["causes"], kind, curve)
            if not any(panels.values()):
                continue
            names.append(f"{curve}-{kind}.svg".replace("_", "-"))
            draw_curves(folder / names[-1], panels, "layer", y_label, chosen)
    for measure, y_label in _MEASURES.items():
        names.append(f"separability-{measure}.svg".replace("_", "-"))
        apart = _apart(content["separability"], measure)
        draw_curves(folder / names[-1], apart, "layer", y_label, chosen)
    return names


def diagnosis_to_markdown(content: Content, plots: Sequence[str]) -> str:
    """The rule, the choice with its evidence, and where each curve peaks."""
    choice, section = content["choice"], content["section"]
    chosen = ", ".join(map(str, choice["layers"])) or "none, for none is admissible"
    lines = [
        "# Diagnosis",
        "",
        f"**Chosen layers: {chosen}** (FFN output), from `{choice['decided_by']}` ablations.",
        "",
        f"Rule. {choice['rule']}",
        "",
        f"Measured on the fit split alone (digest `{content['samples'][:16]}`), which shares no "
        f"prompt with the splits that guards are judged on: {section['prompts']} harmful and as "
        f"many harmless prompts in each form, {section['donors']} donors, "
        f"{section['rounds']} bootstrap rounds, seed {section['seed']}. The refusal score is the "
        f"log-odds of opening the answer like a refusing against like a compliant turn, "
        f"{section['opening']} tokens. Declared divergence: {section['divergence']} nats.",
        "",
        "| layer | cause [95 %] | divergence | separability | ranks |",
        "|---|---|---|---|---|",
        *(_evidence(row, choice["layers"]) for row in choice["evidence"]),
        "",
        "## Where the curves peak",
        "",
        "cause: drop of the refusal score on harmful prompts less that on harmless ones. "
        "divergence: KL of the first token on harmless prompts, in nats. attack: rise of answers "
        "that are neither refused nor degenerate, where answers were generated.",
        "",
        "| form | ablated | kind | layer | cause [95 %] | divergence | most attack rise [95 %] |",
        "|---|---|---|---|---|---|---|",
        *_peaks(content["causes"]),
        "",
        "| form | component | " + " | ".join(_MEASURES.values()) + " |",
        "|---|---|" + "---|" * len(_MEASURES),
        *_separability_peaks(content["separability"]),
        "",
        *(f"![{name}]({name})" for name in plots),
    ]
    return "\n".join(lines) + "\n"


def _attack_label(kind: str) -> tuple[str, str]:
    return "attack_rise", f"rise of attack success, {kind}"


def _of(effects: Effects, part: str, kind: str, curve: str) -> list[Content]:
    return [e for e in effects if (e["part"], e["kind"]) == (part, kind) and curve in e]


def _panels(causes: Content, kind: str, curve: str) -> dict[str, list[Curve]]:
    panels: dict[str, list[Curve]] = {}
    for form, cause in causes.items():
        panels[form] = []
        for part, name in _PARTS.items():
            rows = _of(cause["effects"], part, kind, curve)
            if rows:
                x = [row["layer"] + (0.5 if part == "pair" else 0.0) for row in rows]
                y, low, high = (
                    [row[curve][key] for row in rows] for key in ("value", "low", "high")
                )
                panels[form].append(Curve(name, x, y, low, high))
    return panels


def _apart(reports: Sequence[Content], measure: str) -> dict[str, list[Curve]]:
    return {
        form: [
            Curve(
                name,
                [r["layer"] for r in reports if r["component"] == component],
                [r["forms"][form][measure] for r in reports if r["component"] == component],
            )
            for component, name in _COMPONENTS.items()
        ]
        for form in reports[0]["forms"]
    }


def _evidence(row: Content, chosen: Sequence[int]) -> str:
    name = f"**{row['layer']}**" if row["layer"] in chosen else str(row["layer"])
    ranks = "not admissible" if row["ranks"] is None else "{} + {}".format(*row["ranks"])
    return (
        f"| {name} | {_interval(row['cause'])} | {row['divergence']:.2g} "
        f"| {row['separability']:.2f} | {ranks} |"
    )


def _peaks(causes: Content) -> Iterator[str]:
    for form, cause in causes.items():
        kinds = dict.fromkeys(e["kind"] for e in cause["effects"])
        for part, name in _PARTS.items():
            for kind in kinds:
                rows = _of(cause["effects"], part, kind, "cause")
                if not rows:
                    continue
                top = max(rows, key=lambda row: (row["cause"]["value"], -row["layer"]))
                attack = "-"
                if "attack_rise" in top:
                    most = max(rows, key=lambda row: (row["attack_rise"]["value"], -row["layer"]))
                    attack = f"{_interval(most['attack_rise'])} at {most['layer']}"
                yield (
                    f"| {form} | {name} | {kind} | {top['layer']} | {_interval(top['cause'])} "
                    f"| {top['divergence']['value']:.2g} | {attack} |"
                )


def _separability_peaks(reports: Sequence[Content]) -> Iterator[str]:
    for form in reports[0]["forms"]:
        for component, name in _COMPONENTS.items():
            own = [r for r in reports if r["component"] == component]
            cells = []
            for measure in _MEASURES:
                top = max(own, key=lambda r: (r["forms"][form][measure], -r["layer"]))
                cells.append(f"{top['forms'][form][measure]:.3g} at {top['layer']}")
            yield f"| {form} | {name} | {' | '.join(cells)} |"


def _interval(effect: Content) -> str:
    return f"{effect['value']:.2f} [{effect['low']:.2f}, {effect['high']:.2f}]"
