"""Does an image beside the words weaken refusal, and which part of it: presence, look, or words?

VLM-Guard (arXiv 2502.10486) sees attack success rise from 15 % to 34 % when a blank image is put
beside the same harmful words.
"""

from __future__ import annotations

from guardbake.evaluate.judges import Verdict
from guardbake.evaluate.table import GREEDY, LABELS, Group, table_of
from guardbake.report.blocks import Grid
from guardbake.report.plots import Interval, Intervals, Plot
from guardbake.samples import Form
from guardbake.studies.setting import Figures, Setting, Study

FORMS: tuple[Form, ...] = ("text", "blank", "natural", "typographic")
ARMS = ("undefended", "guarded")
_SHOWN = {
    "text": "the words alone",
    "blank": "the words beside a blank image",
    "natural": "the words beside a picture with natural statistics",
    "typographic": "the words drawn into the image",
}
_ALPHA = 0.05


def measure(setting: Setting) -> Figures:
    """The same test prompts in every form, undefended and under the fitted guard."""
    asked = setting.asked(setting.prompts("test"), FORMS)
    verdicts = {
        arm: asked.verdicts(arm, spec)
        for arm, spec in zip(ARMS, (None, setting.guard), strict=True)
    }
    groups = []
    for label in LABELS:
        rows = {
            form: [n for n, s in enumerate(asked.samples) if (s.label, s.form) == (label, form)]
            for form in FORMS
        }
        names = [(asked.samples[n].source, asked.samples[n].index) for n in rows["text"]]
        for arm, found in verdicts.items():
            by_form: dict[str, dict[str, list[Verdict]]] = {
                form: {GREEDY: [found[n] for n in own]} for form, own in rows.items()
            }
            groups.append(Group(label, arm, names, by_form))
    return {"guard": setting.guard.digest, "table": table_of(groups).to_json()}


def finding(figures: Figures) -> list[str]:
    """How each form compares with the words alone, arm by arm; a p-value above 5 % says so."""
    rows, pairings = figures["table"]["rows"], figures["table"]["pairings"]
    said = []
    for arm in ARMS:
        refused = {
            row["arm"]: row["refused"]
            for row in rows
            if (row["label"], row["family"]) == ("harmful", arm)
        }
        tests = {p["arm"]: p for p in pairings if (p["label"], p["family"]) == ("harmful", arm)}
        parts = [f"{_SHOWN[form]}: {_rate(refused[form])}" for form in FORMS]
        said.append(f"{arm.capitalize()}, harmful prompts refused with {'; '.join(parts)}.")
        lost = [form for form in FORMS[1:] if _differs(tests[form]) < 0]
        gained = [form for form in FORMS[1:] if _differs(tests[form]) > 0]
        same = [form for form in FORMS[1:] if form not in lost + gained]
        for forms, what in (
            (lost, "Refused less often than the words alone"),
            (gained, "Refused more often than the words alone"),
            (same, "No difference that so many prompts can show"),
        ):
            if forms:
                tested = ", ".join(f"{form} (p = {tests[form]['p_holm']:.2g})" for form in forms)
                said.append(f"{what}: {tested}; McNemar, after Holm.")
    harmless = {
        (row["family"], row["arm"]): row["refused"] for row in rows if row["label"] == "harmless"
    }
    form = max(FORMS, key=lambda form: harmless["guarded", form]["value"])
    said.append(
        f"Of harmless prompts the guard refuses most as {form}: {_rate(harmless['guarded', form])},"
        f" the undefended model there {_rate(harmless['undefended', form])}."
    )
    return said


def _differs(test: dict[str, float]) -> int:
    """1 if refused more often than as text, -1 if less often, 0 if the test cannot tell."""
    if test["p_holm"] > _ALPHA:
        return 0
    return 1 if test["gained"] > test["lost"] else -1


def _rate(rate: dict[str, float]) -> str:
    return f"{rate['value']:.2f} [{rate['low']:.2f}, {rate['high']:.2f}]"


def table(figures: Figures) -> Grid:
    verdicts = ("refused", "answered", "degenerate")
    return Grid(
        "Shares of the same prompts in every form, with 95 % Wilson intervals.",
        ("prompts", "arm", "form", *verdicts),
        [
            (
                row["label"],
                row["family"],
                row["arm"],
                *(f"{_rate(row[v])} ({row[v]['count']}/{row[v]['total']})" for v in verdicts),
            )
            for row in figures["table"]["rows"]
        ],
    )


def plots(figures: Figures) -> list[Plot]:
    """Refused share by form, both arms; harmful and harmless side by side."""
    panels: dict[str, dict[str, list[Interval]]] = {}
    for row in figures["table"]["rows"]:
        rate = row["refused"]
        groups = panels.setdefault(f"{row['label']} prompts", {})
        groups.setdefault(row["arm"], []).append(
            Interval(row["family"], rate["value"], rate["low"], rate["high"])
        )
    return [Intervals("refused", panels, "share refused")]


BLANK_IMAGE = Study(
    "Does an image beside a harmful request weaken refusal, and does the guard mend it?",
    measure,
    finding,
    table,
    plots,
)
