"""The levels of a certificate, and which gates stand on each.

node: each guard node alone against the law. layer: what the sites hold. logits: what the model says
next. behaviour: what people see. cache: one text, fed in several ways. Beside them, graph: that the
guard, and an engine if one is required, are there at all.
"""

from __future__ import annotations

from typing import Literal

Level = Literal["graph", "node", "layer", "logits", "behaviour", "cache"]
LETTERS: dict[Level, str] = {
    "graph": "",
    "node": "A",
    "layer": "B",
    "logits": "C",
    "behaviour": "D",
    "cache": "E",
}
GATES: dict[Level, tuple[str, ...]] = {
    "graph": ("presence", "engine"),
    "node": ("law", "canary"),
    "layer": ("ffn output", "cosine", "norm ratio", "score", "decisions"),
    "logits": ("logits", "kl", "top-1", "top-5", "noise", "tokens", "blindness"),
    "behaviour": ("attack", "harmless", "runners"),
    "cache": ("cache",),
}
LEVEL_OF: dict[str, Level] = {gate: level for level, gates in GATES.items() for gate in gates}


def title(level: Level) -> str:
    """
    >>> title("node"), title("graph")
    ('A node', 'graph')
    """
    return f"{LETTERS[level]} {level}".strip()
