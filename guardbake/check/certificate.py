"""The certificate: what was compared, on which digests, under which budgets, and one verdict.

The verdict is computed once, here, from the gates; the last line on the screen, the JSON, the
Markdown and the exit status all read this one value.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

SCHEMA = 1
Status = Literal["pass", "fail"]


@dataclass(frozen=True)
class Gate:
    """One declared check. detail: what was seen. A check that did not run has failed."""

    name: str
    passed: bool
    detail: str


def verdict(gates: Sequence[Gate]) -> Status:
    """pass iff there are gates and every one passed."""
    return "pass" if gates and all(gate.passed for gate in gates) else "fail"


def certificate(
    name: str,
    gates: Sequence[Gate],
    digests: Mapping[str, Any],
    figures: Mapping[str, Any],
) -> dict[str, Any]:
    """digests: of what is certified; `guard` and `onnx` (by file name) are what verifying reads.
    figures: the reports behind the gates.
    """
    return {
        "schema": SCHEMA,
        "name": name,
        "verdict": verdict(gates),
        "gates": [asdict(gate) for gate in gates],
        "digests": dict(digests),
        "figures": dict(figures),
    }


def to_markdown(content: Mapping[str, Any]) -> str:
    """The certificate for people."""
    digests, figures = content["digests"], content["figures"]
    lines = [
        f"# Certificate: {content['name']}",
        "",
        f"**Verdict: {content['verdict']}**",
        "",
        "| gate | result | seen |",
        "|---|---|---|",
        *(
            f"| {g['name']} | {'pass' if g['passed'] else 'FAIL'} | {g['detail']} |"
            for g in content["gates"]
        ),
        "",
        "## What is certified",
        "",
        *(f"- {key}: `{value}`" for key, value in digests.items() if isinstance(value, str)),
        *(f"- {key}: `{value}`" for key, value in digests.get("onnx", {}).items()),
        "",
        "## Parity with the PyTorch reference",
        "",
        "| quantity | largest difference | budget | compared | where | source of the budget |",
        "|---|---|---|---|---|---|",
        *(_comparison(row) for row in figures["parity"]["comparisons"]),
        "",
        f"Gate decisions: {figures['parity']['decisions']}, "
        f"flipped inside the margin band: {figures['parity']['flips_in_band']}. "
        f"Margins |score|: {_numbers(figures['parity']['margins'])}.",
        "",
        "## Behaviour on held-out prompts",
        "",
        "Greedy answers of the PyTorch reference, keyword judge (its measured bias is in "
        "`guardbake.evaluate.judges`), 95 % Wilson intervals. A refusal is a keyword refusal; what "
        "is not refused is not thereby a working harmful answer.",
        "",
        figures["behaviour"]["markdown"].rstrip(),
        "",
        "## Sensors and sign test",
        "",
        *_sensors(figures["fit"]),
    ]
    return "\n".join(lines) + "\n"


def _comparison(row: Mapping[str, Any]) -> str:
    limit = "none allowed" if row["limit"] is None else f"{row['limit']:.3g}"
    worst = row["worst"] if isinstance(row["worst"], str) else f"{row['worst']:.3g}"
    return (
        f"| {row['quantity']} | {worst} | {limit} | {row['compared']} | {row['where']} "
        f"| {row['source']} |"
    )


def _numbers(values: Mapping[str, float]) -> str:
    return ", ".join(f"{key} {value:.3g}" for key, value in values.items()) or "no gate"


def _sensors(fit: Mapping[str, Any]) -> list[str]:
    lines = []
    for sensor in fit["sensors"]:
        lines += [
            f"Sensor at {', '.join(sensor['sites'])}, the image tokens' mean weighted "
            f"{sensor['pooling']:g}, thresholds (harmless standard deviations) "
            f"{', '.join(f'{limit:.4g}' for limit in sensor['thresholds'])}. On the validation "
            f"split: harmless prompts that open the gate {_numbers(sensor['harmless_open_rate'])}; "
            f"harmful {_numbers(sensor['harmful_open_rate'])}; AUC {_numbers(sensor['auc'])}.",
            "",
        ]
    lines += [
        f"Chosen by generation: **{fit['chosen']}**.",
        "",
        "| candidate | rise of harmful refusal | refused because |",
        "|---|---|---|",
        *(
            f"| {row['candidate']} | {row['rise']:+.3f} "
            f"| {'; '.join(row['refused_because']) or '-'} |"
            for row in fit["sign_test"]
        ),
    ]
    return lines
