"""A bundle stands whole under its name, or the name is as it was."""

from __future__ import annotations

import errno
import os
import shutil
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from guardbake.bundle.manifest import MANIFEST, Origins, check_files, read_manifest
from guardbake.bundle.publish import copy_file, publish, recover, share_weights
from guardbake.errors import IntegrityError, MalformedError, ResourceFault, UsageError

if TYPE_CHECKING:
    import subprocess

Spawn = Callable[..., "subprocess.Popen[str]"]
Leftovers = Callable[[Path], list[str]]


def fine(_: Path) -> None: ...


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """Sources of a bundle that holds a certificate and some weights."""
    folder = tmp_path / "sources"
    folder.mkdir()
    contents = {"certificate.json": b"{}", "weights.bin": bytes(300_000)}
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return {"certificate.json": folder / "certificate.json", "sub/w": folder / "weights.bin"}


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "build" / "demo"


def contents(out: Path) -> bytes:
    """The certificate of the bundle at `out`, once all of it is checked."""
    check_files(out, read_manifest(out), full=True)
    return (out / "certificate.json").read_bytes()


def test_a_new_bundle(
    files: dict[str, Path], out: Path, origins: Origins, leftovers: Leftovers
) -> None:
    seen = []
    manifest = publish(files, out, origins, lambda folder: seen.append((folder, out.exists())))
    assert read_manifest(out) == manifest
    assert contents(out) == b"{}"
    assert leftovers(out.parent) == []
    assert [exists for _, exists in seen] == [False]
    assert all(path.stat().st_nlink == 1 for path in (out / "sub/w", files["sub/w"]))


def test_same_files_same_bytes(files: dict[str, Path], tmp_path: Path, origins: Origins) -> None:
    for name in ("a", "b"):
        publish(files, tmp_path / name, origins, fine)
    assert (tmp_path / "a" / MANIFEST).read_bytes() == (tmp_path / "b" / MANIFEST).read_bytes()


def test_a_bundle_of_ours_is_replaced(
    files: dict[str, Path], out: Path, origins: Origins, leftovers: Leftovers
) -> None:
    publish(files, out, origins, fine)
    files["certificate.json"].write_bytes(b"[]")
    publish(files, out, origins, fine)
    assert contents(out) == b"[]"
    (out / "sub" / "w").unlink()  # a damaged one is still ours
    publish(files, out, origins, fine)
    assert contents(out) == b"[]"
    assert leftovers(out.parent) == []


def test_the_sources_may_be_the_bundle_itself(
    files: dict[str, Path], out: Path, origins: Origins, tmp_path: Path
) -> None:
    publish(files, out, origins, fine)
    (tmp_path / "new.json").write_bytes(b"[1]")
    publish({"certificate.json": tmp_path / "new.json", "sub/w": out / "sub/w"}, out, origins, fine)
    assert contents(out) == b"[1]"


@pytest.mark.parametrize(
    "occupy",
    [
        lambda out: out.write_text("mine"),
        lambda out: out.mkdir(),
        lambda out: (out.mkdir(), (out / "thesis.tex").write_text("mine")),
        lambda out: (out.mkdir(), (out / MANIFEST).write_text("{}")),
        lambda out: out.symlink_to("/"),
        lambda out: out.symlink_to("nowhere"),
    ],
    ids=["file", "empty", "folder", "other manifest", "link", "dangling link"],
)
def test_anything_else_is_left_alone(
    files: dict[str, Path], out: Path, origins: Origins, occupy: Callable[[Path], object]
) -> None:
    out.parent.mkdir(parents=True)
    occupy(out)
    before = sorted((p, p.lstat().st_mtime_ns, p.lstat().st_ino) for p in out.parent.rglob("*"))
    with pytest.raises(UsageError) as caught:
        publish(files, out, origins, fine)
    assert caught.value.exit_code == 2
    after = sorted((p, p.lstat().st_mtime_ns, p.lstat().st_ino) for p in out.parent.rglob("*"))
    assert after == before


def test_a_bundle_with_somebodys_notes_is_left_alone(
    files: dict[str, Path], out: Path, origins: Origins
) -> None:
    publish(files, out, origins, fine)
    (out / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"notes\.txt"):
        publish(files, out, origins, fine)
    assert (out / "notes.txt").read_text() == "mine"


def test_a_check_that_refuses_keeps_the_old(
    files: dict[str, Path], out: Path, origins: Origins, leftovers: Leftovers
) -> None:
    publish(files, out, origins, fine)
    files["certificate.json"].write_bytes(b"[]")

    def refuse(_: Path) -> None:
        raise IntegrityError(found="a", expected="b", where="c", remedy="d")

    with pytest.raises(IntegrityError):
        publish(files, out, origins, refuse)
    assert contents(out) == b"{}"
    assert leftovers(out.parent) == []


def test_bad_names_and_sources(files: dict[str, Path], out: Path, origins: Origins) -> None:
    for name in ("../x", "/x", "a//b"):
        with pytest.raises(MalformedError):
            publish({**files, name: files["sub/w"]}, out, origins, fine)
    with pytest.raises(UsageError, match=r"a file manifest\.json"):
        publish({**files, MANIFEST: files["sub/w"]}, out, origins, fine)
    with pytest.raises(UsageError, match="no file for b"):
        publish({**files, "b": out / "absent"}, out, origins, fine)
    with pytest.raises(MalformedError, match="no entry for certificate"):
        publish({"sub/w": files["sub/w"]}, out, origins, fine)
    assert not out.exists()


def test_a_full_disk(
    files: dict[str, Path],
    out: Path,
    origins: Origins,
    leftovers: Leftovers,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    publish(files, out, origins, fine)

    def no_room(*_: int) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "copy_file_range", no_room)
    with pytest.raises(ResourceFault, match="No space left on device"):
        publish(files, out, origins, fine)
    with pytest.raises(ResourceFault):
        share_weights(files["sub/w"], out.parent / "weights", "copy")
    assert leftovers(out.parent) == []
    assert [path.name for path in out.parent.iterdir()] == [out.name]
    assert contents(out) == b"{}"


LIMITED = """
import resource, sys
from pathlib import Path
from guardbake.bundle.manifest import EngineNotBuilt, Origins
from guardbake.bundle.publish import publish
from guardbake.errors import ResourceFault
source, out = Path(sys.argv[1]), Path(sys.argv[2])
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
origins = Origins("0" * 64, {}, "0" * 64, EngineNotBuilt("test"))
try:
    publish({"certificate.json": source}, out, origins, lambda folder: None)
except ResourceFault as error:
    print(error.exit_code, error)
"""


def test_the_kernel_refuses_to_write_on(
    files: dict[str, Path], out: Path, spawn: Spawn, leftovers: Leftovers
) -> None:
    """Nothing simulated: a limit on the size of files stops the copy half way."""
    output, _ = spawn(LIMITED, files["sub/w"], out).communicate(timeout=20)
    assert output.startswith("8 found File too large")
    assert list(out.parent.iterdir()) == []


@pytest.mark.parametrize("code", [errno.EXDEV, errno.ENOSYS, errno.EINVAL])
def test_a_file_system_without_ranges(
    files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def unknown(*_: int) -> int:
        raise OSError(code, os.strerror(code))

    files["sub/w"].write_bytes(bytes(range(256)) * 9000)
    monkeypatch.setattr(os, "copy_file_range", unknown)
    copy_file(files["sub/w"], tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == files["sub/w"].read_bytes()


SWAP = """
import os, signal, sys
from pathlib import Path
from guardbake.bundle.manifest import EngineNotBuilt, Origins
from guardbake.bundle import publish as module
source, out, when, left = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])

def killing(name):
    real = getattr(module.os if name == "rename" else module, name)
    def call(*arguments):
        global left
        left -= 1
        if left < 0 and when.startswith("before"):
            os.kill(os.getpid(), signal.SIGKILL)
        real(*arguments)
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
    return call

name = when.split()[1]
setattr(module.os if name == "rename" else module, name, killing(name))
origins = Origins("0" * 64, {}, "0" * 64, EngineNotBuilt("test"))
module.publish({"certificate.json": source, "more": source}, out, origins, lambda folder: None)
"""
KILLS = [
    ("after copy_file", 0),
    ("after write_manifest", 0),
    ("before rename", 0),
    ("before rename", 1),
    ("after rename", 1),
    ("before remove", 0),
]


@pytest.mark.parametrize(("when", "count"), KILLS)
def test_kill_in_the_middle_of_a_publish(
    files: dict[str, Path],
    out: Path,
    origins: Origins,
    spawn: Spawn,
    leftovers: Leftovers,
    when: str,
    count: int,
) -> None:
    publish(files, out, origins, fine)
    new = files["certificate.json"].with_name("new.json")
    new.write_bytes(b"[]")
    process = spawn(SWAP, new, out, when, count)
    output, _ = process.communicate(timeout=20)
    assert process.returncode == -signal.SIGKILL, output
    if (when, count) == ("before rename", 1):
        assert not out.exists(), "the one moment in which the name is free"
        recover(out)
    assert contents(out) == (b"[]" if (when, count) in KILLS[4:] else b"{}")
    publish({"certificate.json": new}, out, origins, fine)
    assert contents(out) == b"[]"
    assert leftovers(out.parent) == []


def test_recover_does_not_bring_back_the_rest_of_a_deleted_bundle(
    files: dict[str, Path], out: Path, origins: Origins, leftovers: Leftovers
) -> None:
    publish(files, out, origins, fine)
    out.rename(out.with_name(f".{out.name}.0123456789ab.guardbake-old"))
    other = out.with_name(".other.0123456789ab.guardbake-old")
    shutil.copytree(out.with_name(f".{out.name}.0123456789ab.guardbake-old"), other)
    (out.with_name(f".{out.name}.0123456789ab.guardbake-old") / "sub" / "w").unlink()
    recover(out)
    assert not out.exists()
    assert leftovers(out.parent) == [other.name]


MANY = """
import sys
from pathlib import Path
from guardbake.bundle.manifest import EngineNotBuilt, Origins, check_files
from guardbake.bundle.publish import publish
source, out = Path(sys.argv[1]), Path(sys.argv[2])
origins = Origins("0" * 64, {}, "0" * 64, EngineNotBuilt("test"))
for _ in range(15):
    publish({"certificate.json": source}, out, origins, lambda folder: None)
print("fine")
"""


def test_two_publish_to_one_name(
    files: dict[str, Path], out: Path, spawn: Spawn, leftovers: Leftovers
) -> None:
    processes = [spawn(MANY, files[name], out) for name in ("certificate.json", "sub/w")]
    assert [process.communicate(timeout=30)[0] for process in processes] == ["fine\n"] * 2
    assert contents(out) in (b"{}", bytes(300_000))
    assert leftovers(out.parent) == []


def test_weights_are_shared(files: dict[str, Path], tmp_path: Path) -> None:
    source = files["sub/w"]
    link = tmp_path / "cache-link"
    link.symlink_to(source)
    share_weights(link, tmp_path / "linked")
    share_weights(source, tmp_path / "copied", "copy")
    assert (tmp_path / "linked").lstat().st_ino == source.stat().st_ino
    assert (tmp_path / "copied").stat().st_ino != source.stat().st_ino
    assert (tmp_path / "copied").read_bytes() == source.read_bytes()
    for share in (share_weights, partial(share_weights, how="copy")):
        with pytest.raises(UsageError, match="something there already"):
            share(source, tmp_path / "linked")
    with pytest.raises(UsageError, match="no file there"):
        share_weights(tmp_path / "absent", tmp_path / "x")


def test_sharing_across_file_systems_says_copy(
    files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def other(*_: object) -> None:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr(os, "link", other)
    with pytest.raises(UsageError, match="copy the weights instead"):
        share_weights(files["sub/w"], tmp_path / "x")
    assert not (tmp_path / "x").exists()
