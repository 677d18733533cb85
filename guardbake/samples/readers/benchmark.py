"""What a benchmark on disk is to us: where it comes from, how it must lie there, what it yields.

A source names a benchmark, its path and, after '#', the parts that are wanted::

    mm-safetybench:data/MM-SafetyBench#SD_TYPO,01-Illegal_Activitiy

Every prompt stands in one part of each axis (here: the kind of picture, the scenario). Parts of one
axis are joined, axes are crossed. Every benchmark also has the axis `half`: half-1 and half-2 by
the digest of the plain request, so that a request falls into the same half in whatever benchmark
or wrapping it comes: fit on one half and test on the other, and the splits are disjoint.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from guardbake.errors import MalformedError, RecipeError
from guardbake.samples import Label, Prompt
from guardbake.samples.digests import digest

Parts = Mapping[str, str]
HALVES = ("half-1", "half-2")


@dataclass(frozen=True)
class Entry:
    """A prompt of a benchmark, its source still empty, and the part it is in on each axis."""

    prompt: Prompt
    parts: Parts


@dataclass(frozen=True)
class Benchmark:
    """One benchmark.

    home: where to get it. layout: the path, and what must lie there. read: all of its prompts in
    the order of its files; raises MalformedError. usual: the parts that are taken on an axis of
    which the source names none; an axis without usual parts is taken whole.
    """

    name: str
    home: str
    layout: str
    read: Callable[[Path], list[Entry]]
    usual: tuple[str, ...] = ()


def read_benchmark(
    benchmark: Benchmark, path: Path, parts: Sequence[str], label: Label, source: str
) -> list[Prompt]:
    """The prompts of one label in the parts asked for.

    Raises RecipeError if there is nothing at the path, no such part, or no prompt of the label;
    MalformedError if the files are not laid out as published, or if a picture is missing.
    """
    if not path.exists():
        raise RecipeError(
            found="no such file or folder",
            expected=benchmark.layout,
            where=f"source {source!r}: {path}",
            remedy=f"get {benchmark.name} from {benchmark.home}, or correct the path",
        )
    entries = _placed(benchmark.read(path), source)
    fitting = [entry for entry in entries if entry.prompt.label == label]
    if not fitting:
        raise RecipeError(
            found=f"no {label} prompt",
            expected=" or ".join(sorted({entry.prompt.label for entry in entries})),
            where=f"source {source!r}",
            remedy=f"name {benchmark.name} under the label it has",
        )
    chosen = _chosen(benchmark, fitting, parts, source)
    _demand_pictures(benchmark, chosen, source)
    return chosen


def missing(path: Path, wanted: str) -> MalformedError:
    """The error for a benchmark that lacks a file; `wanted` is its published place."""
    folder = path if path.is_dir() else path.parent
    parquet = any(folder.rglob("*.parquet"))
    return MalformedError(
        found=f"{'only parquet files, and ' if parquet else ''}no {wanted}",
        expected="the files as the benchmark's own project page publishes them",
        where=str(path),
        remedy="get that layout (README of the benchmark); parquet copies of it are not read"
        if parquet
        else "complete the download, or correct the path",
    )


def _placed(entries: Sequence[Entry], source: str) -> list[Entry]:
    placed = []
    for entry in entries:
        first = int(digest(entry.prompt.request)[0], 16)
        parts = {**entry.parts, "half": HALVES[first % 2]}
        placed.append(Entry(replace(entry.prompt, source=source), parts))
    return placed


def _chosen(
    benchmark: Benchmark, entries: Sequence[Entry], parts: Sequence[str], source: str
) -> list[Prompt]:
    """The prompts in the parts asked for."""
    present: dict[str, set[str]] = {}
    for entry in entries:
        for axis, part in entry.parts.items():
            present.setdefault(axis, set()).add(part)
    wanted: dict[str, set[str]] = {}
    for part in parts:
        axes = [axis for axis, found in present.items() if part in found]
        if not axes:
            raise RecipeError(
                found=f"part {part!r}",
                expected="; ".join(f"{a}: {', '.join(sorted(p))}" for a, p in present.items()),
                where=f"source {source!r}",
                remedy="name parts that the benchmark has, with commas between",
            )
        wanted.setdefault(axes[0], set()).add(part)
    for axis, found in present.items():
        usual = found.intersection(benchmark.usual)
        if usual and axis not in wanted:
            wanted[axis] = usual
    prompts = [
        entry.prompt
        for entry in entries
        if all(entry.parts[axis] in allowed for axis, allowed in wanted.items())
    ]
    if not prompts:
        raise RecipeError(
            found="no prompt that is in all of these parts",
            expected="parts that share prompts",
            where=f"source {source!r}",
            remedy="name fewer parts",
        )
    return prompts


def _demand_pictures(benchmark: Benchmark, prompts: Sequence[Prompt], source: str) -> None:
    absent = [p for p in prompts if isinstance(p.image, Path) and not p.image.is_file()]
    if absent:
        raise MalformedError(
            found=f"{len(absent)} of {len(prompts)} prompts without their picture",
            expected=benchmark.layout,
            where=f"{source} [{absent[0].index}]",
            remedy=f"complete the pictures from {benchmark.home}, or name fewer parts after '#'",
        )
