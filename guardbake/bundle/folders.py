"""Folders that appear complete or not at all.

A folder is written under a temporary name beside its place and renamed when it is whole. Its writer
holds a kernel lock on it; the kernel drops the lock when the process dies, however it dies, so
a temporary folder without a holder is left over and is swept by whoever comes next.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import TracebackType

from guardbake.errors import GuardbakeError, ResourceFault, UsageError

PARTIAL = ".guardbake-partial"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_SHORT_WRITE = re.compile(r"\d+ requested and \d+ written")  # numpy drops the errno
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST)


class DiskFaults(AbstractContextManager[None]):
    """Turns a disk that is full into a ResourceFault, whichever library ran into it.

    folder: a folder on that disk, or one that is yet to be made there. Other errors pass.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.free = 0

    def __enter__(self) -> None:
        path = self.folder.absolute()
        there = next(place for place in (path, *path.parents) if place.is_dir())
        self.free = shutil.disk_usage(there).free

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not isinstance(error, Exception) or isinstance(error, GuardbakeError):
            return
        reason = _disk_full(error)
        if reason:
            raise ResourceFault(
                found=f"{reason} ({self.free / 1e6:.1f} MB were free before writing)",
                expected="room for the files",
                where=str(self.folder),
                remedy="free some space, or write to another disk, and run it again",
            ) from error


def _disk_full(error: BaseException | None) -> str:
    """What a full disk was called, in this error or in one that led to it; empty if it was not."""
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        if isinstance(error, OSError) and error.errno in _FULL:
            return os.strerror(error.errno)
        if isinstance(error, OSError) and _SHORT_WRITE.search(str(error)):
            return f"a short write ({error})"
        # safetensors and protobuf wrap the system's error in text
        for code in _FULL[:2]:
            if os.strerror(code) in str(error) and not isinstance(error, OSError):
                return os.strerror(code)
        seen.append(error)
        error = error.__cause__ or error.__context__
    return ""


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Alone among guardbake's processes in changing what stands in `folder`, for a moment."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


@contextmanager
def partial_folder(target: Path) -> Iterator[Path]:
    """A new temporary folder beside `target`; on any way out it is gone, unless renamed.

    Makes the parents of `target` and sweeps what dead processes left there. Raises UsageError if
    nothing can be written there, ResourceFault if the disk is full, also within the body.
    """
    with DiskFaults(target.parent):
        path, handle = _create(target)
        try:
            yield path
        finally:
            remove(path)
            os.close(handle)


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Like `partial_folder`, and after the body it becomes `target`, which must not exist yet."""
    refuse_existing(target)
    with partial_folder(target) as path:
        yield path
        flush(path)
        with locked(target.parent):
            refuse_existing(target)
            os.rename(path, target)
            flush_folder(target.parent)


def refuse_existing(target: Path) -> None:
    if os.path.lexists(target):
        raise UsageError(
            found="something there already",
            expected="a name that nothing has yet",
            where=str(target),
            remedy="choose another name, or remove what is there",
        )


def _create(target: Path) -> tuple[Path, int]:
    path = beside(target, PARTIAL)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with locked(target.parent):
            _sweep(target.parent)
            path.mkdir()
            handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
            fcntl.flock(handle, fcntl.LOCK_EX)  # nobody can hold it: sweeping needs the lock above
    except OSError as error:
        if error.errno not in _FORBIDDEN:
            raise
        raise UsageError(
            found=f"{error.strerror} at {error.filename}",
            expected="a folder in which files can be written",
            where=str(target.parent),
            remedy="choose another folder, or mend its permissions",
        ) from error
    return path, handle


def _sweep(parent: Path) -> None:
    """Remove the temporary folders whose writers are dead; what resists waits for the next run."""
    for path in sorted(parent.glob(f".*{PARTIAL}")):
        try:
            handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError:
            continue  # gone, or not a folder of ours
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            remove(path)
        except BlockingIOError:
            continue  # its writer is alive
        finally:
            os.close(handle)


def beside(target: Path, suffix: str) -> Path:
    """A hidden name next to `target` that nobody else has."""
    return target.with_name(f".{target.name}.{secrets.token_hex(6)}{suffix}")


def remove(path: Path) -> None:
    """Remove a folder or a file, if it is there; what resists waits for the next sweep."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def flush(folder: Path) -> None:
    """Bring every file and folder below to the disk, so that the rename cannot overtake them."""
    for root, _, names in os.walk(folder):
        for name in names:
            path = Path(root, name)
            if not path.is_symlink():
                _fsync(path, os.O_RDONLY)
        flush_folder(Path(root))


def flush_folder(folder: Path) -> None:
    """Bring the folder's own entries to the disk."""
    _fsync(folder, os.O_RDONLY | os.O_DIRECTORY)


def _fsync(path: Path, flags: int) -> None:
    handle = os.open(path, flags)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
