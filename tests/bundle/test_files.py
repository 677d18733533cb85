"""Strict JSON, safe names, honest listings."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from guardbake.bundle.canonical import MAX_BYTES, canonical, digest_of, parse
from guardbake.bundle.files import FileEntry, list_files, require_digest, require_distinct
from guardbake.errors import IntegrityError, MalformedError


def test_equal_values_are_equal_bytes() -> None:
    assert canonical({"b": (1,), "a": {"y": 1, "x": None}}) == canonical(
        {"a": {"x": None, "y": 1}, "b": [1]}
    )
    assert digest_of({"a": 1}) != digest_of({"a": 1.0})


def test_no_spelling_for_what_is_not_finite() -> None:
    with pytest.raises(ValueError, match="Out of range float"):
        canonical({"a": float("nan")})


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"\xff",
        b'{"a":1,"a":2}',
        b'{"a":{"b":1,"b":1}}',
        b'{"a":NaN}',
        b'{"a":-Infinity}',
        b"[" * 100_000,
        b"1" * 5000,
        b" " * (MAX_BYTES + 1),
    ],
)
def test_json_is_read_strictly(data: bytes) -> None:
    with pytest.raises(MalformedError) as caught:
        parse(data, "x.json", "write it again")
    assert caught.value.where == "x.json"


@pytest.mark.parametrize(
    "name",
    [
        "",
        "/a",
        "..",
        "../a",
        "a/../b",
        "a//b",
        "./a",
        "a/",
        "a\\b",
        "c:a",
        "a\0b",
        "a\nb",
        "\ud800",
    ],
)
def test_names_that_leave_the_folder_are_refused(name: str) -> None:
    with pytest.raises(MalformedError):
        FileEntry(name, 0, "0" * 64)


@pytest.mark.parametrize("name", ["a", "engines/a.engine", ".hidden", "a..b", "café"])
def test_plain_names_are_fine(name: str) -> None:
    assert FileEntry(name, 0, "0" * 64).name == name


@pytest.mark.parametrize("text", ["0" * 63, "0" * 65, "A" * 64, "g" * 64, 7, None, "0" * 63 + "\n"])
def test_digests_are_hexadecimal(text: object) -> None:
    with pytest.raises(MalformedError):
        require_digest(text, "here")


@pytest.mark.parametrize("names", [["b", "a"], ["a", "a"], ["A", "a"]])
def test_names_are_sorted_and_distinct_in_any_case(names: list[str]) -> None:
    with pytest.raises(MalformedError):
        require_distinct(names, "here")


def test_links_and_special_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a").write_bytes(b"123")
    assert list_files(tmp_path) == {"sub/a": 3}
    (tmp_path / "link").symlink_to("sub/a")
    with pytest.raises(IntegrityError, match="link, a symbolic link"):
        list_files(tmp_path)
    (tmp_path / "link").unlink()
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(IntegrityError, match="pipe, a special file"):
        list_files(tmp_path)
