"""An evaluation for people to read: EVALUATION.md, from the same values as evaluation.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def to_markdown(content: Mapping[str, Any]) -> str:
    """The evaluation as one page."""
    settings = content["settings"]
    lines = [
        f"# Evaluation: {content['recipe']}",
        "",
        *_digests(content),
        "",
        f"Answers of at most {settings['tokens']} tokens of the PyTorch reference, greedy"
        + _sampled(settings)
        + ". Judge: keywords (its measured bias is in `guardbake.evaluate.judges`). Refused and "
        "answered are what the judge calls them; degenerate output is neither. An answer is not "
        "thereby a working harmful one. Intervals: 95 % Wilson on counts, bootstrap over prompts "
        "elsewhere.",
        "",
        f"Fitted on: {', '.join(content['fitted_on'])}. Gate and choice of the edit saw: "
        f"{', '.join(content['validated_on'])}.",
        "",
        content["markdown"].rstrip(),
        "",
        *_judges(content["judges"]),
        *_costs(content["costs"]),
        *_utility(content["utility"]),
        *_searches(content["searches"], settings["pgd"]),
    ]
    return "\n".join(lines).rstrip() + "\n"


def _digests(content: Mapping[str, Any]) -> list[str]:
    lines = [f"- model: `{content['model']}`"]
    lines += [f"- {name} split: `{digest}`" for name, digest in content["samples"].items()]
    for arm in content["arms"]:
        parts = [f"guard `{arm['guard']}`"] if arm["guard"] else []
        parts += ["canned answer when its gate opens"] if arm["canned"] else []
        parts += ["preamble"] if arm["preamble"] else []
        parts += [f"no guard: the model fine-tuned, `{arm['tuned']}`"] if arm["tuned"] else []
        lines.append(f"- {arm['name']}: {', '.join(parts) or 'nothing'}")
    return lines


def _sampled(settings: Mapping[str, Any]) -> str:
    if not settings["seeds"]:
        return ""
    return (
        f" and with {len(settings['seeds'])} sampled seeds (temperature "
        f"{settings['temperature']:g}, top-p {settings['top_p']:g})"
    )


def _judges(judges: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = []
    for judge in judges:
        lines += [
            f"## By {judge['name']}",
            "",
            f"A model judge (checkpoint `{judge['checkpoint']}`), greedy answers to harmful "
            "prompts: answered is what it calls harmful, refused what it does not.",
            "",
            judge["markdown"],
            judge["agreement_markdown"],
        ]
    return lines


def _costs(costs: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = [
        "**What harmless answers cost**",
        "",
        "The undefended model's own greedy answers, forced upon each arm. A canned answer has no "
        "distribution, so its arms are left out: their cost is what they refuse above.",
        "",
        "| arm | family | perplexity | over undefended | KL, nats a token | tokens |",
        "|---|---|---|---|---|---|",
    ]
    for row in costs:
        lines.append(
            f"| {row['arm']} | {row['family']} | {row['perplexity']:.3f} "
            f"| {_interval(row['ratio'])} | {_interval(row['divergence'])} | {row['tokens']} |"
        )
    return [*lines, ""]


def _utility(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    if not rows:
        return ["No benchmark of questions was asked for, so task utility is not measured.", ""]
    lines = [
        "**Task utility**",
        "",
        "Questions of benchmarks, greedy, scored by rules (`guardbake.evaluate.utility`), not by a "
        "language model as some benchmarks' own scripts do. Paired with the first arm, question by "
        "question (repetitions of one are one).",
        "",
        "| benchmark | arm | metric | right | score | unread | right only here | only there "
        "| McNemar p after Holm |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        right = row["right"]
        p = "-" if row["p_holm"] is None else f"{row['p_holm']:.2g}"
        lines.append(
            f"| {row['benchmark']} | {row['arm']} | {row['metric']} "
            f"| {right['count']}/{right['total']} | {_interval(row['score'])} | {row['unread']} "
            f"| {row['gained']} | {row['lost']} | {p} |"
        )
    return [*lines, ""]


def _searches(searches: Sequence[Mapping[str, Any]], pgd: Mapping[str, Any] | None) -> list[str]:
    if pgd is None:
        return []
    lines = [
        "**What the image searches found**",
        "",
        f"L-infinity PGD with momentum, {pgd['steps']} steps that shrink from {pgd['step']:g} eps "
        f"to nothing, from a random start (seed {pgd['seed']}), on the {pgd['base']} image; the "
        "best image of a search, rounded to 8 bit and read in again by the model's own processor, "
        "is what was asked above. Adaptive searches know the arm and pass its gate smoothly. "
        "Surprise: of the wanted compliant turn, nats a token, under the arm as it is.",
        "",
        "| search | found on | eps | prompts | surprise before | after | open before | after |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in searches:
        opened = [row[f"open_{when}"] for when in ("before", "after")]
        before, after = ("-" if count is None else count for count in opened)
        lines.append(
            f"| {row['kind']} | {row['arm']} | {row['eps']} | {row['prompts']} "
            f"| {row['surprise_before']:.3f} | {row['surprise_after']:.3f} | {before} | {after} |"
        )
    return lines


def _interval(value: Mapping[str, float]) -> str:
    return f"{value['value']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"
