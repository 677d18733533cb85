"""A checkpoint folder as files: whole, of a known family, hashed. No PyTorch is needed for that."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from guardbake.errors import IntegrityError, MalformedError, UnsupportedError, UsageError
from guardbake.vlm.catalog import Family, family_of

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
QFORMER_TOKENIZER = "qformer_tokenizer"
"""The folder of a second tokenizer, which a processor with a Q-Former keeps in the checkpoint's."""
_HEADER_LIMIT = 100_000_000  # bytes; the safetensors format's own limit
_DIGESTED = (".json", ".jinja", ".model", ".safetensors", ".txt")
_PIECE = 1 << 24  # bytes hashed at a time
_AT_ONCE = 4  # files


def checkpoint_folder(path_or_id: str, allow_network: bool) -> Path:
    """The folder itself, or that of a hub id that is cached here (or fetched, if allow_network).

    Raises UsageError if there is neither.
    """
    folder = Path(path_or_id)
    if folder.is_dir():
        return folder.resolve()
    # only a model's id needs them
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(path_or_id, local_files_only=not allow_network))
    except (LocalEntryNotFoundError, HFValidationError) as error:
        raise UsageError(
            found=f"no folder and no cached model {path_or_id!r}",
            expected="a checkpoint folder, or the id of a model that is cached here",
            where="the model's path",
            remedy="correct the path, or allow the network",
        ) from error


def family_at(folder: Path) -> Family:
    """The family that config.json names.

    Raises UsageError if there is none, MalformedError if it is not JSON, UnsupportedError if it is
    of a family that we do not know: transformers' own message for that lists hundreds.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise UsageError(
            found="no config.json",
            expected="a transformers checkpoint folder",
            where=str(folder),
            remedy="point at the folder that save_pretrained wrote",
        )
    return family_of(_ModelType(str(read_json(path).get("model_type"))))


@dataclass
class _ModelType:
    model_type: str


def check_weights(folder: Path) -> None:
    """Check every safetensors file's header against the file's size, before anything reads it.

    Raises UnsupportedError if there is none, MalformedError naming the file that is cut, too long,
    unreadable, or named by the index and absent.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UnsupportedError(
            found="no safetensors file",
            expected="weights in *.safetensors (pickled weights are never opened)",
            where=str(folder),
            remedy="convert the checkpoint with save_pretrained",
        )
    index = folder / INDEX
    if index.is_file():
        shards = set(read_json(index).get("weight_map", {}).values())
        absent = sorted(shards - {file.name for file in files})
        if absent:
            raise malformed(f"no file {absent[0]}", "every shard of the index", index)
    for file in files:
        _check_safetensors(file)


@dataclass(frozen=True)
class CheckpointFiles:
    """A checkpoint's weight, configuration and tokenizer files as they were when they were hashed.

    sha256: by file name, sorted. stamps: size, time of the last change and inode, by file name.
    """

    folder: Path
    sha256: Mapping[str, str]
    stamps: Mapping[str, tuple[int, int, int]]

    @property
    def digest(self) -> str:
        """sha256 over name and content of the files."""
        lines = "".join(f"{name}\0{digest}\n" for name, digest in self.sha256.items())
        return hashlib.sha256(lines.encode()).hexdigest()

    def require_unchanged(self) -> None:
        """Raise IntegrityError if a file has been written to since, or has come or gone."""
        now = _stamps(self.folder)
        changed = sorted(n for n in {*now, *self.stamps} if now.get(n) != self.stamps.get(n))
        if changed:
            raise IntegrityError(
                found=f"{changed[0]} changed while it was read",
                expected="a checkpoint that nothing writes to",
                where=str(self.folder),
                remedy="wait until the checkpoint is complete, and run it again",
            )


def hash_files(folder: Path) -> CheckpointFiles:
    """Read and hash the checkpoint's files, some of them at once."""
    stamps = _stamps(folder)
    with ThreadPoolExecutor(max_workers=_AT_ONCE) as several:
        found = dict(zip(stamps, several.map(_sha256, (folder / n for n in stamps)), strict=True))
    return CheckpointFiles(folder, found, stamps)


def _sha256(path: Path) -> str:
    """In large pieces: other threads compute meanwhile, and each piece waits for its turn."""
    state, piece = hashlib.sha256(), bytearray(_PIECE)
    with path.open("rb", buffering=0) as file:
        while size := file.readinto(piece):
            state.update(memoryview(piece)[:size])
    return state.hexdigest()


def digest_checkpoint(folder: Path) -> str:
    """`CheckpointFiles.digest` of a folder."""
    return hash_files(folder).digest


def _stamps(folder: Path) -> dict[str, tuple[int, int, int]]:
    found = [*folder.iterdir(), *folder.glob(f"{QFORMER_TOKENIZER}/*")]
    files = sorted(path for path in found if path.suffix in _DIGESTED and path.is_file())
    states = {file.relative_to(folder).as_posix(): file.stat() for file in files}
    return {name: (s.st_size, s.st_mtime_ns, s.st_ino) for name, s in states.items()}


def _check_safetensors(file: Path) -> None:
    size = file.stat().st_size
    with file.open("rb") as handle:
        head = handle.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else -1
        if length < 0 or length > min(_HEADER_LIMIT, size - 8):
            raise malformed(f"a header of {length} bytes in {size}", "a whole header", file)
        raw = handle.read(length)
    try:
        header = json.loads(raw)
        ends = [v["data_offsets"][1] for k, v in header.items() if k != "__metadata__"]
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise malformed("a header that is not safetensors", "a JSON header", file) from error
    expected = 8 + length + max(ends, default=0)
    if size != expected:
        raise malformed(f"{size} bytes", f"{expected} bytes, as the header says", file)


def read_json(path: Path) -> dict[str, Any]:
    """A file's JSON object; raises MalformedError if it holds none."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise malformed(str(error), "JSON", path) from error
    if not isinstance(values, dict):
        raise malformed(f"a JSON {type(values).__name__}", "a JSON object", path)
    return values


def malformed(found: str, expected: str, where: Path) -> MalformedError:
    """The error that says so."""
    return MalformedError(
        found=found, expected=expected, where=str(where), remedy="fetch or save the file again"
    )
