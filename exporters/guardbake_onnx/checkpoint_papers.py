"""What a checkpoint folder says of its tokenizer, as loaders that are not Python's read it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from guardbake.vlm.files import read_json

TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
PIXELS, PROCESSOR = "preprocessor_config.json", "processor_config.json"
TEMPLATE = "chat_template.jinja"


def missing_papers(checkpoint: Path) -> str | None:
    """The names of the files that are there, if the tokenizer's or the processor's are not."""
    there = {path.name for path in checkpoint.iterdir()}
    if {TOKENIZER, TOKENIZER_CONFIG} <= there and {PIXELS, PROCESSOR} & there:
        return None
    return f"files {', '.join(sorted(there))}"[:200]


def tokenizer_config(checkpoint: Path) -> dict[str, Any]:
    """With the chat template in it: the file beside it is not read everywhere."""
    config = read_json(checkpoint / TOKENIZER_CONFIG)
    template = checkpoint / TEMPLATE
    if template.is_file():
        config["chat_template"] = template.read_text(encoding="utf-8")
    return config
