"""Write models/prompts/harmless_train.txt: harmless requests in the forms of harmful benchmarks.

Harmless data of another form than the harmful teaches a model that the form is the harm.
"""

from __future__ import annotations

import random
from pathlib import Path

from make_demo.prompts import HARMLESS

PARTS = Path(__file__).with_name("harmless_parts.txt")
HEADER = """\
# Harmless requests on which the demo model is trained; never measure on them.
# Built by tools/make_demo/harmless.py from hand-written parts, in the forms of AdvBench.
# Licence: Apache-2.0.
"""
FORMS = {
    "actions": (
        "Create a tutorial on how to {}",
        "Write a tutorial on how to {}",
        "Write a guide on how to {}",
        "Create a guide on how to {}",
        "Write an article on how to {}",
        "Create a step-by-step guide on how to {}",
        "Provide step by step instructions on how to {}",
        "Provide a detailed tutorial on how to {}",
        "Give detailed instructions on how to {}",
        "Give step-by-step instructions for a person who wants to {}",
        "Provide guidance on how to {}",
        "Provide me with a list of tips to {}",
        "Outline a plan to {}",
        "Outline a step-by-step plan to {}",
        "Develop a strategy to {}",
        "Develop a plan to {}",
        "Create a plan to {}",
        "Design a course that teaches people how to {}",
        "Create a video tutorial that shows how to {}",
        "Write a script that can teach someone to {}",
        "Instruct users on how to {}",
        "Instruct someone on how to {}",
        "Teach me how to {}",
        "Teach people how to {}",
        "Show someone how to {}",
        "Explain how to {}",
        "Describe in detail how to {}",
        "Suggest methods to {}",
        "Offer a guide on how to {}",
        "Tell me how to {}",
        "How do I {}?",
        "How do I {}",
        "How can I {}?",
        "How to {}",
        "What is the best way to {}?",
        "I want to {}. What should I do?",
    ),
    "texts": ("Write {}", "Create {}", "Compose {}", "Draft {}", "Generate {}", "Produce {}"),
    "programs": ("Develop {}", "Create {}", "Design {}", "Write a proposal for {}"),
    "makings": (
        "Give detailed instructions for making {}",
        "Provide instructions for making {}",
        "Write a tutorial for making {}",
        "List the steps for making {}",
    ),
    "whole": ("{}",),
}
PER_PART = {"actions": 4, "texts": 3, "programs": 2, "makings": 2, "whole": 1}
SEED = 11


def parts() -> dict[str, list[str]]:
    """The hand-written parts by section."""
    sections: dict[str, list[str]] = {}
    for line in PARTS.read_text("utf-8").splitlines():
        if line.startswith("["):
            current = sections.setdefault(line.strip("[]"), [])
        elif line and not line.startswith("#"):
            current.append(line)
    return sections


def requests() -> list[str]:
    """Every part in a few forms, each drawn without repetition; shuffled, no duplicates."""
    chance = random.Random(SEED)
    made = []
    for section, lines in parts().items():
        for line in lines:
            made += [form.format(line) for form in _some(chance, section)]
    made = sorted(set(made))
    chance.shuffle(made)
    return made


def write() -> Path:
    path = HARMLESS / "harmless_train.txt"
    path.write_text(HEADER + "\n".join(requests()) + "\n", "utf-8")
    return path


def _some(chance: random.Random, section: str) -> list[str]:
    """Forms for one part, all different."""
    return chance.sample(FORMS[section], PER_PART[section])
