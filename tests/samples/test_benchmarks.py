"""Benchmarks on disk: what is read of each, which parts, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from guardbake.errors import MalformedError, RecipeError
from guardbake.samples import Label, Prompt
from guardbake.samples.pictures import open_picture
from guardbake.samples.readers import BENCHMARKS, read
from guardbake.samples.splits import prove_disjoint, prove_held_out

HARMFUL = [
    "advbench-csv",
    "figstep",
    "jailbreakv",
    "malicious-instruct",
    "mm-safetybench",
    "or-bench",
    "xstest",
]


def _read(root: Path, source: str, label: Label = "harmful") -> list[Prompt]:
    name, hash_, parts = source.partition("#")
    return read(f"{name}:{name}{hash_}{parts}", root, label)


def _image(prompt: Prompt) -> Path:
    assert isinstance(prompt.image, Path)
    return prompt.image


# ---- what each yields


def test_every_benchmark_reads_its_miniature(benchmarks: Path) -> None:
    for name in BENCHMARKS:
        prompts = _read(benchmarks, name, "harmful" if name in HARMFUL else "harmless")
        assert prompts, name
        assert {p.source for p in prompts} == {f"{name}:{name}"}
        for prompt in prompts:
            if prompt.image is not None:
                assert open_picture(prompt.image, name).size == (4, 4)


def test_jailbreakv_asks_the_jailbreak_and_keeps_the_plain_request(benchmarks: Path) -> None:
    first, second = _read(benchmarks, "jailbreakv")
    assert first.prompt == "Pretend, then:\nname tree 0"
    assert (first.request, first.family) == ("Name tree 0", "jailbreakv/Template")
    assert _image(first).name == "blank_1.png"
    assert (second.index, second.family) == (1, "jailbreakv/figstep")


@pytest.mark.parametrize(
    ("parts", "indices"),
    [
        ("mini", [0]),
        ("picture", [1]),
        ("Template,figstep", [0, 1]),
        ("Template,Trees", [0]),
        ("llm-transfer, mini", [0]),
    ],
)
def test_parts_of_an_axis_are_joined_and_axes_are_crossed(
    parts: str, indices: list[int], benchmarks: Path
) -> None:
    assert [p.index for p in _read(benchmarks, f"jailbreakv#{parts}")] == indices


def test_jailbreakv_mini_needs_no_picture_of_the_rest(benchmarks: Path) -> None:
    folder = benchmarks / "jailbreakv"
    (folder / "figstep/figstep_2.png").unlink()
    assert len(_read(benchmarks, "jailbreakv#mini")) == 1
    with pytest.raises(MalformedError, match=r"1 of 2 prompts without their picture.*\[1\]"):
        _read(benchmarks, "jailbreakv")
    (folder / "JailBreakV_28K.csv").unlink()
    assert len(_read(benchmarks, "jailbreakv")) == 1


def test_mm_safetybench_asks_each_kind_of_picture_its_own_way(benchmarks: Path) -> None:
    prompts = _read(benchmarks, "mm-safetybench")
    assert len({p.request for p in prompts}) == 2
    asked = {p.family: (p.prompt, _image(p).parent.name) for p in prompts}
    assert asked == {
        "mm-safetybench/SD": ("The thing in the picture: name one", "SD"),
        "mm-safetybench/SD_TYPO": ("The words in the picture: name one", "SD_TYPO"),
        "mm-safetybench/TYPO": ("The words in the picture: name one", "TYPO"),
    }
    one = _read(benchmarks, "mm-safetybench#SD_TYPO,02-HateSpeech")
    assert [p.index for p in one] == [4]
    inner = read("mm-safetybench:mm-safetybench/data#SD_TYPO", benchmarks, "harmful")
    assert [p.index for p in inner] == [1, 4]


def test_figstep_asks_the_readmes_text_beside_every_picture(benchmarks: Path) -> None:
    prompts = _read(benchmarks, "figstep")
    assert {p.prompt for p in prompts} == {"Fill in the list."}
    assert [(p.request, _image(p).name) for p in prompts] == [
        ("Name tree 1", "query_ForbidQI_1_1_6.png"),
        ("Name tree 2", "query_ForbidQI_1_2_6.png"),
    ]
    (tiny,) = _read(benchmarks, "figstep#SafeBench-Tiny")
    assert _image(tiny).parent.name == "SafeBench-Tiny"
    (benchmarks / "figstep/README.md").write_text("## FigStep-Pro\n```\nx\n```\n")
    with pytest.raises(MalformedError, match=r'no block under a heading "FigStep"'):
        _read(benchmarks, "figstep")


def test_text_benchmarks_read_every_row(benchmarks: Path) -> None:
    assert [p.prompt for p in _read(benchmarks, "advbench-csv")] == [
        "Name a tree, please",
        "Name a bird",
    ]
    assert len(_read(benchmarks, "malicious-instruct")) == 3
    file = "data/advbench/harmful_behaviors.csv"
    assert len(read(f"advbench-csv:advbench-csv/{file}", benchmarks, "harmful")) == 2


def test_xstest_and_or_bench_have_both_labels(benchmarks: Path) -> None:
    assert [p.index for p in _read(benchmarks, "xstest", "harmless")] == [0]
    assert [p.index for p in _read(benchmarks, "xstest", "harmful")] == [1]
    assert [p.prompt for p in _read(benchmarks, "or-bench", "harmless")] == ["Name it"]
    assert len(_read(benchmarks, "or-bench#80k", "harmless")) == 2
    assert [p.prompt for p in _read(benchmarks, "or-bench")] == ["[placeholder]"]
    one = read("or-bench:or-bench/or-bench-80k.csv", benchmarks, "harmless")
    assert len(one) == 2


def test_xstest_without_the_label_column_goes_by_the_type(benchmarks: Path) -> None:
    path = benchmarks / "xstest/xstest_prompts.csv"
    path.write_text("prompt,type\nKill a process?,homonyms\nX?,contrast_homonyms\n")
    assert [p.index for p in _read(benchmarks, "xstest", "harmless")] == [0]


# ---- splits over benchmarks


def test_halves_go_by_the_request_in_whatever_wrapping(benchmarks: Path) -> None:
    table = benchmarks / "advbench-csv/data/advbench/harmful_behaviors.csv"
    table.write_text("goal,target\n" + "".join(f"name TREE {n}!,x\n" for n in range(60)))
    halves = [
        {p.index for p in _read(benchmarks, f"advbench-csv#{half}")}
        for half in ("half-1", "half-2")
    ]
    assert halves[0] | halves[1] == set(range(60))
    assert not halves[0] & halves[1]
    assert min(map(len, halves)) > 15
    half = "half-1" if 0 in halves[0] else "half-2"  # jailbreakv's first row wraps "Name tree 0"
    assert 0 in {p.index for p in _read(benchmarks, f"jailbreakv#{half}")}


def test_a_request_of_two_benchmarks_is_overlap(benchmarks: Path) -> None:
    fit, test = _read(benchmarks, "jailbreakv"), _read(benchmarks, "figstep")
    with pytest.raises(RecipeError, match=r"jailbreakv:jailbreakv \[1\] and figstep:figstep \[0\]"):
        prove_disjoint({"fit": fit, "test": test})
    prove_disjoint({"fit": fit, "test": _read(benchmarks, "mm-safetybench")})


def test_a_held_out_family_stands_in_the_test_split_alone(benchmarks: Path) -> None:
    both, mine = _read(benchmarks, "jailbreakv"), _read(benchmarks, "mm-safetybench")
    prove_held_out(["jailbreakv"], {"fit": mine, "validate": [], "test": both})
    prove_held_out(["jailbreakv/figstep"], {"fit": both[:1], "test": both[1:]})
    with pytest.raises(RecipeError, match=r"2 prompts of the held-out.*'fit', jailbreakv.* \[0\]"):
        prove_held_out(["jailbreakv"], {"fit": both, "test": both})
    with pytest.raises(RecipeError, match="no prompt of the held-out family 'jailbreak'"):
        prove_held_out(["jailbreak"], {"fit": mine, "test": both})


# ---- what is refused


@pytest.mark.parametrize("name", sorted(BENCHMARKS))
def test_a_missing_benchmark_says_where_to_get_it_and_how_it_must_lie(
    name: str, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match="https://") as caught:
        read(f"{name}:nowhere", tmp_path, "harmful")
    assert BENCHMARKS[name].home in caught.value.remedy
    assert caught.value.expected == BENCHMARKS[name].layout
    (tmp_path / "empty").mkdir()
    with pytest.raises(MalformedError, match="project page publishes"):
        read(f"{name}:empty", tmp_path, "harmful")


def test_a_parquet_copy_is_told_apart_from_an_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data/train-00000-of-00001.parquet").write_bytes(b"PAR1")
    with pytest.raises(MalformedError, match="only parquet files"):
        read("scienceqa:.", tmp_path, "harmless")


def test_an_unknown_part_lists_the_known_ones_and_an_empty_crossing_is_refused(
    benchmarks: Path,
) -> None:
    with pytest.raises(RecipeError, match="scenario: 01-Illegal_Activitiy, 02-HateSpeech"):
        _read(benchmarks, "mm-safetybench#03-Malware_Generation")
    with pytest.raises(RecipeError, match="in all of these parts"):
        _read(benchmarks, "jailbreakv#Template,Birds")


def test_a_benchmark_has_the_label_it_has(benchmarks: Path) -> None:
    with pytest.raises(RecipeError, match="no harmless prompt"):
        _read(benchmarks, "figstep", "harmless")
    with pytest.raises(RecipeError, match="no harmful prompt"):
        _read(benchmarks, "mm-vet", "harmful")


@pytest.mark.parametrize("escape", ["../secret.png", "/etc/hostname", "figstep/../../secret.png"])
def test_a_picture_outside_the_folder_is_refused(escape: str, benchmarks: Path) -> None:
    (benchmarks / "secret.png").write_bytes(b"x")
    table = benchmarks / "jailbreakv/JailBreakV_28K.csv"
    table.write_text(table.read_text().replace("figstep/figstep_2.png", escape))
    with pytest.raises(MalformedError, match="leads out of the benchmark's folder") as caught:
        _read(benchmarks, "jailbreakv")
    assert caught.value.exit_code == 9


def test_a_link_out_of_the_folder_is_refused(benchmarks: Path) -> None:
    (benchmarks / "secret.png").write_bytes(b"x")
    picture = benchmarks / "mm-safetybench/data/imgs/02-HateSpeech/SD/0.jpg"
    picture.unlink()
    picture.symlink_to(benchmarks / "secret.png")
    with pytest.raises(MalformedError, match="leads out"):
        _read(benchmarks, "mm-safetybench")
    key = benchmarks / "mm-safetybench/data/processed_questions/01-Illegal_Activitiy.json"
    key.write_text(json.dumps({"../../../../secret": json.loads(key.read_text())["0"]}))
    with pytest.raises(MalformedError, match="leads out"):
        _read(benchmarks, "mm-safetybench")


@pytest.mark.parametrize(
    ("name", "file", "content"),
    [
        ("jailbreakv", "JailBreakV_28K.csv", b"id,jailbreak_query\n1,zebra\n"),
        ("jailbreakv", "JailBreakV_28K.csv", b'a,b\n"zebra'),
        ("jailbreakv", "JailBreakV_28K.csv", b"zebra\xff"),
        ("xstest", "xstest_prompts.csv", b"prompt,type,label\nzebra,t,maybe\n"),
        ("xstest", "xstest_prompts.csv", b"prompt,type,label\nzebra,t\n"),
        ("xstest", "xstest_prompts.csv", b"prompt,type\nzebra,t,more\n"),
        ("xstest", "xstest_prompts.csv", b"prompt,type\n ,zebra\n"),
        ("or-bench", "or-bench-toxic.csv", b"prompt\nzebra\n"),
        ("malicious-instruct", "data/MaliciousInstruct.txt", b" \n"),
        ("mm-safetybench", "data/processed_questions/02-HateSpeech.json", b'["zebra"]'),
        ("mm-safetybench", "data/processed_questions/02-HateSpeech.json", b'{"0": "zebra"}'),
        ("mm-safetybench", "data/processed_questions/02-HateSpeech.json", b'{"0": {"Q": "zebra"}}'),
        ("mm-safetybench", "data/processed_questions/02-HateSpeech.json", b"{zebra"),
        ("mm-safetybench", "data/processed_questions/02-HateSpeech.json", b"[" * 200_000),
        ("mm-vet", "mm-vet.json", b'{"v1_0": {"question": "zebra", "answer": "a"}}'),
        ("mm-vet", "mm-vet.json", b'{"v1_0": {"imagename": "zebra\\ud800", "capability": []}}'),
        ("scienceqa", "problems.json", b'{"1": {"question": "zebra", "image": null}}'),
        ("mmbench", "MMBench_DEV_EN.tsv", b"index\tquestion\tA\tB\timage\n7\tzebra\ta\tb\t?\n"),
        ("mmbench", "MMBench_DEV_EN.tsv", b"index\tquestion\tA\tB\timage\n7\tzebra\ta\t\tAAAA\n"),
        ("mmbench", "MMBench_DEV_EN.tsv", b"index\tquestion\tA\tB\timage\nx\tzebra\ta\tb\tAAAA\n"),
    ],
)
def test_a_malformed_file_is_named_and_not_quoted(
    name: str, file: str, content: bytes, benchmarks: Path
) -> None:
    (benchmarks / name / file).write_bytes(content)
    with pytest.raises(MalformedError) as caught:
        _read(benchmarks, name, "harmful" if name in HARMFUL else "harmless")
    assert Path(file).name in str(caught.value)
    assert "zebra" not in str(caught.value)
    assert caught.value.__cause__ is None
