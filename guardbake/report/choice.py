"""Why this guard: the sign test with every candidate, the sensor, the curves over layers."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from guardbake.errors import MalformedError
from guardbake.report.blocks import Block, Grid, Picture, Section, Text, number
from guardbake.report.diagnosis import draw_diagnosis
from guardbake.report.inline import inline
from guardbake.report.plots import Curve, draw_curves
from guardbake.report.schema import Diagnosis, Fit, Named, Place
from guardbake.site import site_from_str

_MEASURES = {"auc": "AUC of the text direction", "mahalanobis": "Mahalanobis distance"}


def choice(fit: Fit) -> Section:
    """The candidates, what generation made of each, and which was taken."""
    rows = {row.candidate: row for row in fit.sign_test}
    if fit.chosen not in rows:
        raise MalformedError(
            found="a choice that is no candidate",
            expected="one of the sign test's rows",
            where="fit.json",
            remedy="fit the guard again with guardbake fit",
        )
    refused = sum(bool(row.refused_because) for row in fit.sign_test)
    taken = rows[fit.chosen]
    said = (
        f"Chosen: {fit.chosen}. Every candidate was generated with on the validation split; of "
        f"{len(rows)}, {refused} were refused, and of the others this one raised refusals of "
        f"harmful prompts most: by {taken.rise:+.3f}, mean over the forms."
    )
    undefended = fit.undefended
    grid = Grid(
        "The sign test: share refused by form, judged on what was generated.",
        ("candidate", "rise", "harmful refused", "harmless refused", "degenerate", "verdict"),
        [
            (
                "undefended",
                "-",
                _shares(undefended.refused_harmful),
                _shares(undefended.refused_harmless),
                "-",
                "the model as it is",
            ),
            *(
                (
                    row.candidate,
                    f"{row.rise:+.3f}",
                    _shares(row.refused_harmful),
                    _shares(row.refused_harmless),
                    f"at most {max(row.degenerate.values(), default=0.0):.3f}",
                    _verdict(row.refused_because, row.candidate == fit.chosen),
                )
                for row in fit.sign_test
            ),
        ],
        (1 + list(rows).index(fit.chosen),),
    )
    return Section("The guard, and why this one", [Text(said), grid, *_sensors(fit.sensors)])


def _verdict(reasons: Sequence[str], chosen: bool) -> str:
    if reasons:
        return f"refused: {'; '.join(reasons)}"
    return "chosen" if chosen else "may be written"


def _shares(values: Named) -> str:
    return ", ".join(f"{name} {value:.2f}" for name, value in values.items())


def _sensors(sensors: Sequence[Mapping[str, Any]]) -> list[Block]:
    if not sensors:
        return [Text("The guard has no sensor: it is always on.")]
    caption = "Sensor {}, as its fit recorded it; rates and AUC on the validation split."
    return [
        Grid(caption.format(gate), ("figure", "value"), list(_flat(sensor)))
        for gate, sensor in enumerate(sensors)
    ]


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Every figure of nested JSON values, by the path to it."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(inner, f"{name} {key}".strip().replace("_", " "))
    elif isinstance(value, list):
        yield name, ", ".join(text for inner in value for _, text in _flat(inner))
    elif isinstance(value, float):
        yield name, number(value)
    else:
        yield name, str(value)


def layers(
    fit: Fit | None, diagnosis: Diagnosis | None, plain: Mapping[str, Any]
) -> Section | None:
    """Curves over layers: a diagnosis's if there is one, else the fit's separability."""
    if diagnosis is not None:
        return Section("Layers", _diagnosed(diagnosis, plain))
    if fit is None or not fit.separability:
        return None
    pictures = [
        Picture(
            f"{label}, harmful against harmless, last prompt token, fit split",
            _drawn(_by_boundary(fit.separability, measure), label, f"fit-{measure}-"),
        )
        for measure, label in _MEASURES.items()
    ]
    return Section("Layers", pictures)


def _diagnosed(diagnosis: Diagnosis, plain: Mapping[str, Any]) -> list[Block]:
    chosen = diagnosis.choice
    names = ", ".join(map(str, chosen.layers))
    blocks: list[Block] = [
        Text(f"Layers {names} (FFN output), decided by {chosen.decided_by}. Rule: {chosen.rule}"),
        Grid(
            "The evidence of the rule, layer by layer; chosen ones marked.",
            ("layer", "cause [95 %]", "separability", "ranks"),
            [
                (
                    str(row.layer),
                    str(row.cause),
                    f"{row.separability:.2f}",
                    "not admissible" if row.ranks is None else "{} + {}".format(*row.ranks),
                )
                for row in chosen.evidence
            ],
            [n for n, row in enumerate(chosen.evidence) if row.layer in chosen.layers],
        ),
    ]
    with TemporaryDirectory() as folder:
        for name in draw_diagnosis(plain, Path(folder)):
            stem = name.removesuffix(".svg")
            svg = inline((Path(folder) / name).read_bytes(), f"{stem}-")
            blocks.append(Picture(f"{stem.replace('-', ' ')}, by layer", svg))
    return blocks


def _by_boundary(places: Sequence[Place], measure: str) -> dict[str, list[Curve]]:
    panels: dict[str, list[Curve]] = {}
    for boundary, title in (("ffn_output", "FFN output"), ("residual", "residual")):
        sites = [(site_from_str(place.site), place) for place in places]
        own = sorted(
            ((site.layer, place) for site, place in sites if site.boundary == boundary),
            key=lambda pair: pair[0],
        )
        forms = sorted({form for _, place in own for form in place.forms})
        panels[title] = [
            Curve(
                form,
                [layer for layer, place in own if _has(place, form, measure)],
                [place.forms[form][measure] for _, place in own if _has(place, form, measure)],
            )
            for form in forms
        ]
    return panels


def _has(place: Place, form: str, measure: str) -> bool:
    return measure in place.forms.get(form, {})


def _drawn(panels: Mapping[str, Sequence[Curve]], label: str, prefix: str) -> str:
    target = io.BytesIO()
    draw_curves(target, panels, "layer", label)
    return inline(target.getvalue(), prefix)
