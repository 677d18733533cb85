"""Load a VLM from an ordinary transformers checkpoint folder; nothing is fetched unless asked."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    HFValidationError,
    LocalEntryNotFoundError,
    StrictDataclassError,
)
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from guardbake.errors import IntegrityError, MalformedError, UnsupportedError, UsageError
from guardbake.plugins import Number
from guardbake.vlm.catalog import Family, family_of

_HEADER_LIMIT = 100_000_000  # bytes; the safetensors format's own limit
INDEX = "model.safetensors.index.json"
QFORMER_TOKENIZER = "qformer_tokenizer"
"""The folder of a second tokenizer, which a processor with a Q-Former keeps in the checkpoint's."""
_PIECE = 1 << 23  # bytes hashed at a time
_DIGESTED = (".json", ".jinja", ".model", ".safetensors", ".txt")


@dataclass(frozen=True)
class Vlm:
    """A loaded VLM.

    model: in eval mode, attention "sdpa", parameters in the dtype asked for, on the CPU, without
      gradients of their own: whoever differentiates here does so by activations or pixels.
    processor: the checkpoint's own processor; untyped because transformers builds it at run time.
    model_digest: sha256 of the checkpoint's weight, configuration and tokenizer files.
    """

    model: PreTrainedModel
    processor: Any
    family: Family
    folder: Path
    model_digest: str

    @property
    def image_token_id(self) -> int:
        """The token that stands for one image feature in input_ids."""
        return int(getattr(self.model.config, self.family.image_token))


def load_vlm(
    path_or_id: str, dtype: torch.dtype = torch.float32, *, allow_network: bool = False
) -> Vlm:
    """Load the model and its processor.

    path_or_id: a checkpoint folder, or a hub id that is cached here (or fetched, if allow_network).
    Raises UsageError (no such folder), UnsupportedError (family, or weights that are not
    safetensors), MalformedError (a truncated or incomplete checkpoint).
    """
    folder = checkpoint_folder(path_or_id, allow_network)
    config = read_config(folder)
    family = family_of(config)
    check_weights(folder)
    loader: Any = AutoModelForImageTextToText  # its stubs do not know output_loading_info
    disable_progress_bar()  # type: ignore[no-untyped-call]  # a bake shows its own
    model, report = loader.from_pretrained(
        folder,
        config=config,
        dtype=dtype,
        attn_implementation="sdpa",
        local_files_only=True,
        use_safetensors=True,
        output_loading_info=True,
    )
    # transformers fills what it does not find with random numbers and only warns
    absent = sorted(report["missing_keys"]) + sorted(str(k) for k in report["mismatched_keys"])
    if absent:
        raise MalformedError(
            found=f"{len(absent)} tensors missing or of another shape, first {absent[0]}",
            expected="every tensor of the model",
            where=str(folder),
            remedy="fetch or save the checkpoint again",
        )
    processor = AutoProcessor.from_pretrained(  # type: ignore[no-untyped-call]
        folder, local_files_only=True
    )
    model.eval().requires_grad_(False)
    return Vlm(model, processor, family, folder, digest_checkpoint(folder))


def load_rounded(vlm: Vlm, number: Number) -> Vlm:
    """The same checkpoint once more, its weights and its arithmetic in `number`."""
    return load_vlm(str(vlm.folder), getattr(torch, number))


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
            raise _malformed(f"no file {absent[0]}", "every shard of the index", index)
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
    """Read and hash the checkpoint's files."""
    stamps = _stamps(folder)
    found = {}
    for name in stamps:
        found[name] = _sha256(folder / name)
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


def checkpoint_folder(path_or_id: str, allow_network: bool) -> Path:
    folder = Path(path_or_id)
    if folder.is_dir():
        return folder.resolve()
    try:
        return Path(snapshot_download(path_or_id, local_files_only=not allow_network))
    except (LocalEntryNotFoundError, HFValidationError) as error:
        raise UsageError(
            found=f"no folder and no cached model {path_or_id!r}",
            expected="a checkpoint folder, or the id of a model that is cached here",
            where="the model's path",
            remedy="correct the path, or allow the network",
        ) from error


def read_config(folder: Path) -> Any:
    path = folder / "config.json"
    if not path.is_file():
        raise UsageError(
            found="no config.json",
            expected="a transformers checkpoint folder",
            where=str(folder),
            remedy="point at the folder that save_pretrained wrote",
        )
    values = read_json(path)
    # asked before transformers, whose own message for an unknown type lists hundreds
    family_of(_ModelType(str(values.get("model_type"))))
    try:
        config: Any = AutoConfig.from_pretrained(folder, local_files_only=True)
    except StrictDataclassError as error:
        raise _malformed(str(error).strip()[-300:], "a consistent configuration", path) from error
    _require_text_model(config, path)
    return config


def _require_text_model(config: Any, path: Path) -> None:
    family = family_of(config)
    if family.text and config.text_config.model_type != family.text:
        raise UnsupportedError(
            found=f"a {family.name} whose text model is a {config.text_config.model_type}",
            expected=f"a {family.text}",
            where=str(path),
            remedy=f"use a checkpoint of this family with a {family.text}",
        )


@dataclass
class _ModelType:
    model_type: str


def _check_safetensors(file: Path) -> None:
    size = file.stat().st_size
    with file.open("rb") as handle:
        head = handle.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else -1
        if length < 0 or length > min(_HEADER_LIMIT, size - 8):
            raise _malformed(f"a header of {length} bytes in {size}", "a whole header", file)
        raw = handle.read(length)
    try:
        header = json.loads(raw)
        ends = [v["data_offsets"][1] for k, v in header.items() if k != "__metadata__"]
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise _malformed("a header that is not safetensors", "a JSON header", file) from error
    expected = 8 + length + max(ends, default=0)
    if size != expected:
        raise _malformed(f"{size} bytes", f"{expected} bytes, as the header says", file)


def read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise _malformed(str(error), "JSON", path) from error
    if not isinstance(values, dict):
        raise _malformed(f"a JSON {type(values).__name__}", "a JSON object", path)
    return values


def _malformed(found: str, expected: str, where: Path) -> MalformedError:
    return MalformedError(
        found=found, expected=expected, where=str(where), remedy="fetch or save the file again"
    )
