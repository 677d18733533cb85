"""The certificate for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from guardbake.check.levels import title


def to_markdown(content: Mapping[str, Any]) -> str:
    """content: as `check.certificate.certificate` makes it."""
    digests, figures = content["digests"], content["figures"]
    lines = [
        f"# Certificate: {content['name']}",
        "",
        f"**Verdict: {content['verdict']}**",
        "",
        "Levels: " + ", ".join(f"{title(k)} {_shown(v)}" for k, v in content["levels"].items()),
        "",
        "| level | gate | result | seen |",
        "|---|---|---|---|",
        *(
            f"| {title(g['level'])} | {g['name']} | {_shown(g['status'])} | {g['detail']} |"
            for g in content["gates"]
        ),
        "",
        "## What is certified",
        "",
        *(f"- {key}: `{value}`" for key, value in digests.items() if isinstance(value, str)),
        *(f"- {key}: `{value}`" for key, value in digests.get("onnx", {}).items()),
        "",
        *_parity(figures["parity"]),
        "## Behaviour on held-out prompts",
        "",
        "Greedy answers of the PyTorch reference, keyword judge (its measured bias is in "
        "`guardbake.evaluate.judges`), 95 % Wilson intervals. A refusal is a keyword refusal; what "
        "is not refused is not thereby a working harmful answer.",
        "",
        figures["behaviour"]["markdown"].rstrip(),
        "",
        *_runners(figures["behaviour"]["runners"]),
        "## Sensors and sign test",
        "",
        *_sensors(figures["fit"]),
    ]
    return "\n".join(lines) + "\n"


def _shown(status: str) -> str:
    return "FAIL" if status == "fail" else status


def _parity(parity: Mapping[str, Any]) -> list[str]:
    return [
        "## Parity with the PyTorch reference",
        "",
        "| gate | quantity | largest difference | budget | compared | where | source |",
        "|---|---|---|---|---|---|---|",
        *(_comparison(row) for row in parity["comparisons"]),
        "",
        f"Gate decisions: {parity['decisions']}, "
        f"flipped inside the margin band: {parity['flips_in_band']}. "
        f"Margins |score|: {_numbers(parity['margins'])}.",
        "",
        *_histogram(parity["histogram"]),
    ]


def _comparison(row: Mapping[str, Any]) -> str:
    limit = "none allowed" if row["limit"] is None else f"{row['limit']:.3g}"
    worst = row["worst"] if isinstance(row["worst"], str) else f"{row['worst']:.3g}"
    return (
        f"| {row['gate']} | {row['quantity']} | {worst} | {limit} | {row['compared']} "
        f"| {row['where']} | {row['source']} |"
    )


def _histogram(bins: list[Mapping[str, Any]]) -> list[str]:
    if not bins:
        return []
    ranges = [
        f"from {each['above']:.0e}" if each["below"] is None else f"below {each['below']:.0e}"
        for each in bins
    ]
    return [
        "| margin | " + " | ".join(ranges) + " |",
        "|---" * (len(bins) + 1) + "|",
        "| decisions | " + " | ".join(str(each["decisions"]) for each in bins) + " |",
        "",
    ]


def _runners(runners: Mapping[str, Any] | None) -> list[str]:
    if runners is None:
        return []
    lines = [
        f"The first {runners['limit']} prompts of each kind, asked of every runner:",
        "",
        "| prompts | " + " | ".join(f"refused by {name}" for name in runners["names"]) + " |",
        "|---" * (len(runners["names"]) + 1) + "|",
    ]
    for row in runners["rows"]:
        counts = " | ".join(f"{row['refused'][name]}/{row['total']}" for name in runners["names"])
        lines.append(f"| {row['label']} {row['form']} | {counts} |")
    return [*lines, ""]


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
