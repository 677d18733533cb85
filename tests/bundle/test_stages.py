"""A stage is done or it is not, whatever cut it short."""

from __future__ import annotations

import errno
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from guardbake.bundle.canonical import JSON
from guardbake.bundle.folders import new_folder
from guardbake.bundle.stages import RECORD, Stage, Workspace, run_stage
from guardbake.errors import IntegrityError, MalformedError, ResourceFault, UsageError

if TYPE_CHECKING:
    import subprocess

Spawn = Callable[..., "subprocess.Popen[str]"]
KEY: dict[str, JSON] = {"model": "a" * 64, "version": "0.1.0", "rank": 8, "ridge": 1e-3}


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path / "work" / "stages")


@pytest.fixture
def stage(workspace: Workspace) -> Stage:
    return workspace.stage("fit", KEY)


def build(folder: Path) -> None:
    (folder / "guard.bin").write_bytes(b"guard")
    (folder / "sub").mkdir()
    (folder / "sub" / "report.json").write_text("{}")


def test_a_stage_is_built_once(stage: Stage, workspace: Workspace) -> None:
    assert not stage.done
    folder, cached = run_stage(stage, build)
    assert (folder, cached) == (stage.folder, False)
    assert (folder / "guard.bin").read_bytes() == b"guard"
    again = workspace.stage("fit", dict(reversed(KEY.items())))

    def never(_: Path) -> None:
        raise AssertionError("built again")

    assert run_stage(again, never) == (folder, True)
    again.check()


def test_every_value_of_the_key_names_another_folder(workspace: Workspace) -> None:
    folders = {workspace.stage("fit", KEY).folder, workspace.stage("export", KEY).folder}
    for name in KEY:
        folders.add(workspace.stage("fit", {**KEY, name: "other"}).folder)
    assert len(folders) == 2 + len(KEY)


def test_the_folder_is_named_after_the_key(workspace: Workspace) -> None:
    assert workspace.stage("fit", {}).folder == workspace.root / "fit-44136fa355b3678a"


@pytest.mark.parametrize("name", ["", "Fit", "a/b", "..", "-a", "a.b"])
def test_stage_names_are_plain(workspace: Workspace, name: str) -> None:
    with pytest.raises(UsageError):
        workspace.stage(name, {})


@pytest.mark.parametrize("error", [KeyError("x"), KeyboardInterrupt(), SystemExit(3)])
def test_an_exception_leaves_nothing(stage: Stage, error: BaseException) -> None:
    def cut_short(folder: Path) -> None:
        build(folder)
        raise error

    with pytest.raises(type(error)):
        run_stage(stage, cut_short)
    assert not stage.done
    assert list(stage.folder.parent.iterdir()) == []


@pytest.mark.parametrize(
    "damage",
    [
        lambda f: (f / "guard.bin").write_bytes(b"gua"),
        lambda f: (f / "guard.bin").unlink(),
        lambda f: (f / "extra").write_bytes(b""),
        lambda f: (f / RECORD).unlink(),
        lambda f: (f / RECORD).write_bytes(b'{"schema"'),
        lambda f: (f / RECORD).write_text(
            (f / RECORD).read_text().replace('"rank": 8', '"rank": 9')
        ),
        lambda f: (f / RECORD).write_text((f / RECORD).read_text().replace("sub/", "../")),
        lambda f: ((f / "guard.bin").unlink(), (f / "guard.bin").symlink_to(RECORD)),
    ],
    ids=["short", "missing", "extra", "no record", "half record", "key", "escape", "link"],
)
def test_a_damaged_stage_is_not_done_and_is_built_again(
    stage: Stage, damage: Callable[[Path], object]
) -> None:
    run_stage(stage, build)
    damage(stage.folder)
    assert not stage.done
    with pytest.raises((IntegrityError, MalformedError)):
        stage.check()
    assert run_stage(stage, build) == (stage.folder, False)
    stage.check()
    assert [path.name for path in stage.folder.parent.iterdir()] == [stage.folder.name]


def test_check_reads_what_done_does_not(stage: Stage) -> None:
    run_stage(stage, build)
    (stage.folder / "guard.bin").write_bytes(b"guarD")
    assert stage.done
    with pytest.raises(IntegrityError, match=r"guard\.bin with sha256"):
        stage.check()


def test_links_and_the_record_name_are_refused(stage: Stage) -> None:
    with pytest.raises(IntegrityError, match="symbolic link"):
        run_stage(stage, lambda folder: (folder / "a").symlink_to("/etc/hosts"))
    with pytest.raises(UsageError, match="stage's record"):
        run_stage(stage, lambda folder: void((folder / RECORD).write_text("{}")))
    assert list(stage.folder.parent.iterdir()) == []


def void(_: object) -> None: ...


def test_a_root_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for root in (tmp_path / "file", tmp_path / "file" / "deeper"):
        with pytest.raises(UsageError):
            run_stage(Workspace(root).stage("fit", KEY), build)


HALF = """
import sys, time
from pathlib import Path
from guardbake.bundle.stages import Workspace
with Workspace(Path(sys.argv[1])).stage("fit", {"k": 1}).writing() as folder:
    (folder / "half").write_bytes(b"x" * 100_000)
    print("writing", flush=True)
    time.sleep(60)
"""


def test_kill_in_the_middle_of_a_stage(
    tmp_path: Path, spawn: Spawn, leftovers: Callable[[Path], list[str]]
) -> None:
    stage = Workspace(tmp_path).stage("fit", {"k": 1})
    with spawn(HALF, tmp_path) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "writing\n"
        run_stage(Workspace(tmp_path).stage("export", KEY), build)
        assert len(leftovers(tmp_path)) == 1, "the folder of a living writer stays"
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert not stage.done
    assert len(leftovers(tmp_path)) == 1
    assert run_stage(stage, build)[1] is False
    assert leftovers(tmp_path) == []
    stage.check()


# Each waits until both have written their file, or the other has finished.
RACE = """
import sys, time
from pathlib import Path
from guardbake.bundle.stages import Workspace, run_stage
root = Path(sys.argv[1])
def build(folder):
    (folder / "a").write_bytes(b"same" * 50_000)
    while len(list(root.glob(".fit-*/a"))) < 2 and not list(root.glob("fit-*")):
        time.sleep(0.002)
print(run_stage(Workspace(root).stage("fit", {"k": 1}), build)[1])
"""


def test_two_bakes_of_one_stage(
    tmp_path: Path, spawn: Spawn, leftovers: Callable[[Path], list[str]]
) -> None:
    """Both build at once; the first puts its folder in place, the second drops its own."""
    processes = [spawn(RACE, tmp_path) for _ in range(2)]
    outputs = [process.communicate(timeout=20)[0] for process in processes]
    assert outputs == ["False\n", "False\n"]
    Workspace(tmp_path).stage("fit", {"k": 1}).check()
    assert leftovers(tmp_path) == []


def full(_: Path) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def wrapped(_: Path) -> None:
    raise RuntimeError("I/O error: No space left on device (os error 28)")


def caused(folder: Path) -> None:
    try:
        full(folder)
    except OSError as error:
        raise ValueError("cannot save") from error


def really_full(_: Path) -> None:
    """The kernel's own ENOSPC."""
    with open("/dev/full", "wb", buffering=0) as file:
        file.write(b"x")


@pytest.mark.parametrize("body", [full, wrapped, caused, really_full])
def test_a_full_disk_within_the_body(stage: Stage, body: Callable[[Path], None]) -> None:
    def both(folder: Path) -> None:
        build(folder)
        body(folder)

    with pytest.raises(
        ResourceFault, match=r"No space left on device \([\d.]+ MB were free"
    ) as caught:
        run_stage(stage, both)
    assert caught.value.exit_code == 8
    assert list(stage.folder.parent.iterdir()) == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_while_flushing(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def fsync(_: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(ResourceFault):
        run_stage(stage, build)
    assert list(stage.folder.parent.iterdir()) == []


def test_other_errors_pass_as_they_are(stage: Stage) -> None:
    with pytest.raises(PermissionError), stage.writing():
        raise PermissionError(errno.EACCES, "no")

    def interrupted(folder: Path) -> None:
        try:
            full(folder)
        except OSError as error:
            raise KeyboardInterrupt from error

    with pytest.raises(KeyboardInterrupt):
        run_stage(stage, interrupted)


def test_a_new_folder_appears_whole(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "out"
    with new_folder(target) as folder:
        build(folder)
        assert not target.exists()
    assert (target / "guard.bin").read_bytes() == b"guard"
    with pytest.raises(UsageError), new_folder(target):
        raise AssertionError("not reached")
    with pytest.raises(ZeroDivisionError), new_folder(tmp_path / "other"):
        raise ZeroDivisionError
    assert sorted(path.name for path in tmp_path.iterdir()) == ["deep"]


def test_the_record_is_the_same_for_the_same_stage(tmp_path: Path) -> None:
    records = []
    for root in ("a", "b"):
        folder, _ = run_stage(Workspace(tmp_path / root).stage("fit", KEY), build)
        records.append((folder / RECORD).read_bytes())
    assert records[0] == records[1]
    assert json.loads(records[0])["key"] == KEY
