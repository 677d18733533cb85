"""Publish a bundle: all of it under its name, or nothing.

The files are copied, never linked: onnx and onnx-ir refuse to read weights that have a second hard
link or stand behind a symbolic one.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import BinaryIO, Literal, NoReturn

from guardbake.bundle.files import list_files, require_name
from guardbake.bundle.folders import (
    DiskFaults,
    beside,
    flush,
    flush_folder,
    locked,
    partial_folder,
    refuse_existing,
    remove,
)
from guardbake.bundle.manifest import (
    MANIFEST,
    Manifest,
    Origins,
    check_files,
    manifest_of,
    read_manifest,
    write_manifest,
)
from guardbake.errors import IntegrityError, MalformedError, UsageError

OLD = ".guardbake-old"
_NO_RANGES = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM)
_NO_LINKS = (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP, errno.EACCES)
_CHUNK = 1 << 30  # bytes a call; the kernel copies at most 2 GiB at a time


def publish(
    files: Mapping[str, Path],
    out: Path,
    origins: Origins,
    check: Callable[[Path], object],
    seal: Callable[[Path, Origins], Manifest] = manifest_of,
) -> Manifest:
    """Make `out` a bundle of `files` (source by relative name), and write its manifest.

    check: called with the complete folder before it gets its name; what it raises stops the
    publishing. Pass `guardbake.bundle.verify.verify_bundle`. seal: says what the manifest is, and
    may add files; `guardbake.bundle.papers.seal` adds the bundle's papers. The sources may stand in
    `out` itself. A bundle of ours at `out` is replaced and anything else there is left alone:
    UsageError. A kill leaves the old bundle or the new one at `out`; if it falls between the two
    renames of the swap, `out` is absent until the next `publish` or `recover` puts the old one
    back. Raises ResourceFault if the disk is full, MalformedError if the files do not make a
    manifest; nothing is left then.
    """
    out = Path(os.path.abspath(out))
    if out.parent.is_dir():
        recover(out)
    refuse_foreign(out)
    _require_sources(files)
    with partial_folder(out) as folder:
        for name, source in sorted(files.items()):
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            copy_file(source, target)
        manifest = seal(folder, origins)
        write_manifest(folder, manifest)
        check(folder)
        flush(folder)
        _swap(folder, out)
    return manifest


def refuse_foreign(out: Path) -> None:
    """UsageError unless `out` is free or holds a bundle of ours and nothing besides."""
    if not os.path.lexists(out):
        return
    if out.is_symlink() or not out.is_dir():
        _refuse("a file or a link", "a folder", out)
    try:
        listed = {entry.name for entry in read_manifest(out).files} | {MANIFEST}
        extra = sorted(set(list_files(out)) - listed)
    except (MalformedError, IntegrityError) as error:
        _refuse(f"a folder that is not a bundle of ours ({error.found})", "a bundle", out)
    if extra:
        _refuse(f"{extra[0]!r:.120}, which is not of the bundle", "a bundle's files only", out)


def recover(out: Path) -> None:
    """Put right what a kill in the middle of a swap left: the old bundle back, or its rest away."""
    with locked(out.parent):
        # Whoever holds the lock is alone, so what is set aside here belongs to a dead process.
        for old in sorted(out.parent.glob(f".*{OLD}")):
            if old.name[1 : -len(OLD)].rpartition(".")[0] != out.name:
                continue
            if not os.path.lexists(out) and _whole(old):
                os.rename(old, out)
            else:
                remove(old)


def _whole(folder: Path) -> bool:
    try:
        check_files(folder, read_manifest(folder), full=False)
    except (MalformedError, IntegrityError):
        return False
    return True


def _swap(folder: Path, out: Path) -> None:
    with locked(out.parent):
        refuse_foreign(out)
        if not os.path.lexists(out):
            os.rename(folder, out)
            flush_folder(out.parent)
            return
        old = beside(out, OLD)
        os.rename(out, old)
        try:
            os.rename(folder, out)
        finally:
            if not os.path.lexists(out):
                os.rename(old, out)
        flush_folder(out.parent)
        remove(old)


def copy_file(source: Path, target: Path) -> None:
    """Copy the bytes to a new file and bring them to the disk; blocks are shared where they can be.

    Raises IntegrityError if the source changes size meanwhile, UsageError if `target` exists.
    """
    refuse_existing(target)
    with source.open("rb", buffering=0) as reader, target.open("xb", buffering=0) as writer:
        size = os.fstat(reader.fileno()).st_size
        _copy_ranges(reader, writer)
        shutil.copyfileobj(reader, writer, 1 << 20)  # what is left: nothing, or all of it
        written = os.fstat(writer.fileno()).st_size
        if written != size:
            raise IntegrityError(
                found=f"{written} bytes copied",
                expected=f"{size} bytes",
                where=str(source),
                remedy="let nothing else write to the file, and run it again",
            )
        os.fsync(writer.fileno())


def _copy_ranges(reader: BinaryIO, writer: BinaryIO) -> None:
    """Let the kernel copy, which shares the blocks on file systems that can."""
    if not hasattr(os, "copy_file_range"):
        return
    try:
        while os.copy_file_range(reader.fileno(), writer.fileno(), _CHUNK):
            pass
    except OSError as error:
        if error.errno not in _NO_RANGES:
            raise


def share_weights(source: Path, target: Path, how: Literal["link", "copy"] = "link") -> None:
    """Give a folder the weights of another: `target` becomes the file `source`, or a copy of it.

    "link" takes no room and no time, and runtimes (onnxruntime, TensorRT) read it. But the file
    then has two hard links, and onnx (`onnx.load`, the checker) and onnx-ir refuse to read the data
    of such a file, in the source's folder too: say "copy" where they are used. Raises UsageError if
    `target` exists or the two folders cannot share a file, ResourceFault if the disk is full.
    """
    refuse_existing(target)
    if not source.is_file():
        _refuse("no file there", "a weights file", source)
    if how == "link":
        try:
            os.link(source.resolve(), target)
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            raise UsageError(
                found=f"{error.strerror}: {source} and {target.parent} cannot share a file",
                expected="two folders of one file system that knows hard links",
                where=str(target),
                remedy='copy the weights instead: how="copy"',
            ) from error
        return
    partial = beside(target, ".partial")
    with DiskFaults(target.parent):
        try:
            copy_file(source, partial)
            os.rename(partial, target)
        finally:
            partial.unlink(missing_ok=True)


def _require_sources(files: Mapping[str, Path]) -> None:
    for name, source in sorted(files.items()):
        require_name(name, "the files to publish")
        if name.casefold() == MANIFEST:
            _refuse(f"a file {MANIFEST}", "any other name", source)
        if not source.is_file():
            _refuse(f"no file for {name}", "a file to copy", source)


def _refuse(found: str, expected: str, where: Path) -> NoReturn:
    raise UsageError(
        found=found,
        expected=expected,
        where=str(where),
        remedy="choose another folder or other files; nothing was changed",
    )
