"""Puts together what the stages left: the bundle's files, and a folder that runs like it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from guardbake.bundle.folders import partial_folder
from guardbake.bundle.manifest import DECODER, GUARD
from guardbake.steps.recheck import GOLDEN
from guardbake.vlm.files import QFORMER_TOKENIZER

ENGINE, ENGINE_RECORD = "decoder.engine", "decoder.engine.json"
_PROCESSOR = (
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "merges.txt",
    "preprocessor_config.json",
    "processor_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
)


def bundle_files(
    checkpoint: Path,
    exported: Path,
    guarded: Path,
    fitted: Path,
    parity: Path,
    engine: Path | str,
) -> dict[str, Path]:
    """The bundle's files by name; the guarded decoder takes the unguarded one's place.

    processor/ is what turns requests into tokens and pixels: the checkpoint's own files.
    """
    files = {path.name: path for path in sorted(exported.iterdir())}
    names = [*_PROCESSOR, *(f"{QFORMER_TOKENIZER}/{name}" for name in _PROCESSOR)]
    files |= {f"processor/{n}": checkpoint / n for n in names if (checkpoint / n).is_file()}
    files[DECODER] = guarded / DECODER
    files[GUARD] = fitted / GUARD
    files[GOLDEN] = parity / GOLDEN
    if not isinstance(engine, str):
        files |= {name: engine / name for name in (ENGINE, ENGINE_RECORD)}
    return files


@contextmanager
def together(guarded: Path, exported: Path, beside: Path) -> Iterator[Path]:
    """A folder that looks like the bundle: the guarded graph with the export's files, linked."""
    with partial_folder(beside / "model") as folder:
        for path in exported.iterdir():
            if path.name != DECODER:
                os.link(path, folder / path.name)
        shutil.copyfile(guarded / DECODER, folder / DECODER)
        yield folder
