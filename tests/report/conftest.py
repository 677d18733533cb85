"""Records as the stages write them, small and of one bake."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from guardbake.evaluate.table import GREEDY, Group, table_of

MODEL, GUARD = "a" * 64, "b" * 64


def table(arms: tuple[str, ...], families: tuple[str, ...]) -> dict[str, Any]:
    """What `evaluate.table` makes of 8 prompts a cell; the last arm refuses every harmful one."""
    groups = [
        Group(
            label,
            family,
            [("source", n) for n in range(8)],
            {
                arm: {
                    GREEDY: [
                        "refused" if label == "harmful" and (arm == arms[-1] or n < 3)
                        else "answered"
                        for n in range(8)
                    ]
                }
                for arm in arms
            },
        )
        for label in ("harmful", "harmless")
        for family in families
    ]  # fmt: skip
    return table_of(groups).to_json()


def fit(name: str = "steer layer 2 alpha 1") -> dict[str, Any]:
    forms = {"text": 0.9, "typographic": 0.4}
    candidate = {
        "candidate": name,
        "rise": 0.25,
        "refused_because": [],
        "refused_harmful": forms,
        "refused_harmless": {"text": 0.0, "typographic": 0.1},
        "degenerate": {"harmful text": 0.0},
    }
    worse = {**candidate, "candidate": "remove layer 2", "refused_because": ["does not rise"]}
    return {
        "chosen": name,
        "sensors": [{"site": "layers.1.residual", "auc": {"text": 0.97}, "taps": [1, 2]}],
        "undefended": {"refused_harmful": forms, "refused_harmless": forms},
        "sign_test": [candidate, worse],
        "separability": [
            {
                "site": f"layers.{n}.{boundary}",
                "forms": {form: {"auc": 0.5 + n / 10, "mahalanobis": 1.0 + n} for form in forms},
            }
            for n in range(3)
            for boundary in ("ffn_output", "residual")
        ],
    }


def evaluation(arm: str = "guard", family: str = "text") -> dict[str, Any]:
    interval = {"value": 0.1, "low": 0.05, "high": 0.2}
    counts = table(("undefended", arm), (family,))
    judge = {
        "name": "a second judge",
        "rows": [row for row in counts["rows"] if row["label"] == "harmful"],
        "agreement": {"same": counts["rows"][0]["refused"], "kappa": 0.75},
    }
    return {
        "recipe": "small",
        "model": MODEL,
        "samples": {"test": "c" * 64},
        "arms": [{"name": "undefended", "guard": None}, {"name": arm, "guard": GUARD}],
        "settings": {"tokens": 12, "seeds": [], "arms": [{"preamble": "a secret sentence"}]},
        "fitted_on": ["text", "typographic"],
        "validated_on": ["text", "blank", "typographic"],
        "table": table(("undefended", arm), (family, "typographic")),
        "markdown": "not shown",
        "judges": [judge],
        "costs": [
            {
                "arm": arm,
                "family": family,
                "prompts": 8,
                "tokens": 90,
                "perplexity": 1.5,
                "ratio": interval,
                "divergence": interval,
            }
        ],
        "searches": [],
    }


def behaviour() -> dict[str, Any]:
    return {
        "table": table(("unguarded", "guarded"), ("text", "blank", "typographic")),
        "attack_ratio": {"value": 0.25, "budget": 0.5},
        "harmless_rise": {"value": {"text": 0.0, "blank": 0.01}, "budget": 0.05},
        "passed": True,
    }


def parity() -> dict[str, Any]:
    row = {
        "gate": "logits",
        "quantity": "logits, decode",
        "worst": 1.5e-5,
        "limit": 1e-4,
        "compared": 96,
        "where": "batch 0, row 1, token 2",
        "source": "float32 of another summation order",
        "passed": True,
    }
    return {
        "passed": True,
        "comparisons": [row, {**row, "quantity": "tokens that differ", "limit": None}],
        "flips_in_band": 0,
        "decisions": 48,
    }


def certificate() -> dict[str, Any]:
    return {
        "schema": 2,
        "name": "small",
        "verdict": "pass",
        "levels": {"graph": "pass"},
        "gates": [
            {"name": "presence", "level": "graph", "status": "pass", "detail": "3 guard nodes"}
        ],
        "digests": {"model": MODEL, "guard": GUARD, "onnx": {"decoder.onnx": "d" * 64}},
        "figures": {"fit": fit(), "behaviour": behaviour(), "parity": parity(), "engine": "none"},
    }


def diagnosis() -> dict[str, Any]:
    def interval(value: float) -> dict[str, float]:
        return {"value": value, "low": value - 0.1, "high": value + 0.1}

    effects = [
        {
            "part": "ffn",
            "kind": "resample",
            "layer": layer,
            "cause": interval(layer / 4),
            "divergence": interval(0.2),
        }
        for layer in range(3)
    ]
    measures = {"auc": 0.9, "silhouette": 0.1, "scatter_ratio": 0.3, "mahalanobis": 2.0}
    return {
        "model": MODEL,
        "samples": "e" * 64,
        "section": {"kinds": ["resample"]},
        "choice": {
            "rule": "The rule <of the layers>.",
            "decided_by": "resample ffn",
            "layers": [2],
            "evidence": [
                {"layer": n, "cause": interval(n / 4), "separability": 2.0, "ranks": ranks}
                for n, ranks in enumerate((None, [1, 0], [0, 1]))
            ],
        },
        "causes": {"text": {"effects": effects}, "typographic": {"effects": effects}},
        "separability": [
            {"layer": n, "component": component, "forms": {"text": measures}}
            for n in range(3)
            for component in ("ffn_output", "attention_output", "residual")
        ],
    }


def study(name: str = "layers") -> dict[str, Any]:
    return {
        "study": name,
        "question": "Where?",
        "model": MODEL,
        "finding": ["After layer 2, <there>."],
        "table": {"caption": "By layer.", "head": ["layer"], "rows": [["1"], ["2"]], "marked": [1]},
        "plots": [
            {
                "kind": "curves",
                "name": "curve",
                "panels": {"text": [{"name": "a", "x": [1, 2], "y": [0.5, 0.25]}]},
                "x_label": "layer",
                "y_label": "share",
            },
            {
                "kind": "clouds",
                "name": "cloud",
                "panels": {"text": [{"name": "a", "x": [1.0], "y": [2.0]}]},
                "x_label": "x",
                "y_label": "y",
            },
            {
                "kind": "intervals",
                "name": "interval",
                "panels": {"p": {"g": [{"name": "a", "value": 0.1, "low": 0.0, "high": 0.2}]}},
                "x_label": "share",
            },
        ],
        "figures": {"secret": "a secret sentence"},
    }


def write(folder: Path, **values: Any) -> Path:
    """A folder with those records."""
    folder.mkdir(exist_ok=True)
    for name, value in values.items():
        (folder / f"{name}.json").write_text(json.dumps(value), encoding="utf-8")
    return folder


@pytest.fixture
def records(tmp_path: Path) -> Callable[..., Path]:
    """`records(fit=fit(), ...)` is a folder with those records."""
    return partial(write, tmp_path / "records")
