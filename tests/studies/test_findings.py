"""Findings follow the figures: the same words are never said of opposite numbers."""

from __future__ import annotations

from typing import Any

from guardbake.evaluate.table import GREEDY, LABELS, Group, table_of
from guardbake.samples import FORMS
from guardbake.studies import anchors, blank_image, boundary, layers, lookalikes, modality, scan


def interval(value: float, half: float = 0.05) -> dict[str, float]:
    return {"value": value, "low": value - half, "high": value + half}


def blank(refused: dict[str, int]) -> dict[str, Any]:
    """Of 20 harmful prompts the first so many are refused in each form; no harmless one is."""
    groups = [
        Group(
            label,
            arm,
            [("source", n) for n in range(20)],
            {
                form: {
                    GREEDY: [
                        "refused" if label == "harmful" and n < refused[form] else "answered"
                        for n in range(20)
                    ]
                }
                for form in blank_image.FORMS
            },
        )
        for label in LABELS
        for arm in blank_image.ARMS
    ]
    return {"table": table_of(groups).to_json()}


def test_blank_image_says_what_the_test_says() -> None:
    figures = blank({"text": 10, "blank": 1, "natural": 20, "typographic": 9})
    said = blank_image.finding(figures)
    assert any(s.startswith("Refused less often") and "blank" in s for s in said)
    assert any(s.startswith("Refused more often") and "natural" in s for s in said)
    assert any(s.startswith("No difference") and "typographic" in s for s in said)
    same = blank_image.finding(blank(dict.fromkeys(blank_image.FORMS, 10)))
    assert not [s for s in same if "less often" in s or "more often" in s]


def test_lookalikes_tell_the_guards_doing_from_the_models() -> None:
    def figures(undefended: int, guarded: int, other: int) -> dict[str, Any]:
        counts = {
            ("look-alikes", "undefended"): undefended,
            ("look-alikes", "guarded"): guarded,
            ("other harmless", "undefended"): 0,
            ("other harmless", "guarded"): other,
        }
        return {
            "rows": [
                {"kind": kind, "form": form, "what": what, "count": count, "total": 20}
                | interval(count / 20)
                for (kind, what), count in counts.items()
                for form in FORMS
            ]
        }

    said = lookalikes.finding(figures(2, 9, 0))
    assert any("adds most refusals" in s and "7 of 20" in s for s in said)
    assert any(s.startswith("Harder than other harmless prompts") for s in said)
    said = lookalikes.finding(figures(5, 5, 5))
    assert any("adds no refusal" in s for s in said)
    assert any(s.startswith("In no form") for s in said)


def shares(value: float) -> dict[str, Any]:
    return {"by_form": {"text": value, "typographic": value}} | interval(value)


def test_layers_name_the_layer_and_respect_the_budget() -> None:
    rows = [
        {"edit": "steer", "layer": 1, "harmful": shares(0.9), "harmless": shares(0.5)},
        {"edit": "steer", "layer": 2, "harmful": shares(0.7), "harmless": shares(0.1)},
        {"edit": "remove", "layer": 1, "harmful": shares(0.2), "harmless": shares(0.1)},
    ]
    figures = {
        "undefended": {"harmful": shares(0.4), "harmless": shares(0.1), "degenerate": 0.0},
        "rows": [row | {"degenerate": 0.0} for row in rows],
        "budget": 0.05,
        "edited": [1],
    }
    said = layers.finding(figures)
    assert any(s.startswith("steer") and "at layer 1, to 0.90" in s for s in said)
    assert any("harmless refusals: 2, of 2" in s for s in said)
    assert "remove: at no layer does it raise refusal of harmful prompts." in said


def test_scan_keeps_to_the_budget_and_names_what_does_harm() -> None:
    def row(name: str, attack: float, refused: float, ratio: float) -> dict[str, Any]:
        return {
            "name": name,
            "edit": name.split()[0],
            "attack": shares(attack),
            "refused": shares(refused),
            "degenerate": 0.0,
            "perplexity": interval(ratio),
            "divergence": interval(0.1),
        }

    rows = [row("a", 0.1, 0.5, 1.2), row("b", 0.2, 0.05, 1.1), row("c", 0.7, 0.05, 1.3)]
    rows = [one | {"front": not scan._beaten(one, rows)} for one in rows]
    assert [one["front"] for one in rows] == [True, True, False]
    figures = {"undefended": row("undefended", 0.6, 0.02, 1.0), "rows": rows, "budget": 0.07}
    said = scan.finding(figures)
    assert any("b leaves least attack success: 0.200" in s for s in said)
    assert any(s.endswith("over the undefended model: c.") for s in said)
    assert scan.table(figures).marked == [1, 2]
    strict = scan.finding(figures | {"budget": 0.0})
    assert any(s.startswith("No configuration keeps") for s in strict)


def test_anchors_call_a_lottery_one() -> None:
    def figures(width: float, narrow: float, spread: float) -> dict[str, Any]:
        areas = {"random": 0.8, "narrow": narrow, "spread": spread}
        return {
            "layer": 3,
            "available": 60,
            "left_out": [100],
            "rows": [
                {"kind": kind, "pairs": pairs}
                | {
                    name: {form: interval(value, half) for form in ("text", "typographic")}
                    for name in ("auc", "detection")
                }
                for kind, value in areas.items()
                for pairs, half in ((10, 0.2), (60, width))
            ],
        }

    steady = anchors.finding(figures(0.01, 0.7, 0.9))
    assert any("from 60 pairs on, luck moves it by at most" in s for s in steady)
    assert any("0.900 with spread anchors, 0.700 with narrow" in s for s in steady)
    assert any("for want of prompts (60 pairs): 100" in s for s in steady)
    loose = anchors.finding(figures(0.1, 0.9, 0.7))
    assert any("even 60 pairs leave more than" in s for s in loose)
    assert any("0.900 with narrow anchors, 0.700 with spread" in s for s in loose)
    assert any("give the same median" in s for s in anchors.finding(figures(0.01, 0.8, 0.8)))


def test_boundary_bends_only_beyond_its_interval() -> None:
    def figures(gain: float, half: float) -> dict[str, Any]:
        rows = [
            {"layer": n, "form": form, "linear": 0.8, "kernel": 0.8 + gain}
            | {"gain": interval(gain, half)}
            for n in (1, 2)
            for form in ("text", "typographic")
        ]
        return {"rows": rows}

    assert any("There the boundary is bent" in s for s in boundary.finding(figures(0.1, 0.05)))
    assert any("nothing here speaks against" in s for s in boundary.finding(figures(0.1, 0.2)))
    assert any("it loses after layers 1, 2" in s for s in boundary.finding(figures(-0.1, 0.05)))


def test_modality_says_where_a_threshold_would_stand() -> None:
    def figures(offset: float) -> dict[str, Any]:
        row = {
            "layer": 4,
            "gaps": {"text to blank": 1.0, "text to typographic": 2.0, "blank to typographic": 1.0},
            "shifts": {"text": 4.0, "blank": 3.0, "typographic": 1.0},
            "offsets": {"blank": 0.1, "typographic": offset},
            "alike": {"text and blank": 0.9, "text and typographic": 0.5},
        }
        return {"rows": [row]}

    far = modality.finding(figures(3.0))
    assert any("typographic" in s and "would open for most of them" in s for s in far)
    below = modality.finding(figures(-2.0))
    assert any("stands 1.00 of the way above them" in s for s in below)
    assert not [s for s in below if "would open" in s]
