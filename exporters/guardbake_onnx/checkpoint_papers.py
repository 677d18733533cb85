"""What a checkpoint folder says of its tokenizer, as loaders that are not Python's read it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from guardbake.vlm.files import malformed, read_json

TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
PIXELS, PROCESSOR = "preprocessor_config.json", "processor_config.json"
TEMPLATE = "chat_template.jinja"


def missing_papers(checkpoint: Path) -> str | None:
    """The names of the files that are there, if the tokenizer's or the processor's are not."""
    there = {path.name for path in checkpoint.iterdir() if path.is_file()}
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


def image_processor(checkpoint: Path) -> Any:
    """The checkpoint's, as transformers makes it with what its files leave to Python's defaults.

    Raises MalformedError if transformers cannot.
    """
    from transformers import AutoImageProcessor

    for name in (PIXELS, PROCESSOR):
        if (checkpoint / name).is_file():
            read_json(checkpoint / name)
    try:
        return AutoImageProcessor.from_pretrained(  # type: ignore[no-untyped-call]
            checkpoint, local_files_only=True
        )
    except (AttributeError, LookupError, OSError, TypeError, ValueError) as error:
        said = f"{type(error).__name__}: {error}"[:200]
        raise malformed(said, "an image processor of transformers", checkpoint) from error
