"""Where a checkpoint's weights lie: file and offset of every parameter. Only headers are read."""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, rename_source_key

from guardbake.errors import IntegrityError, MalformedError, UnsupportedError
from guardbake.vlm.files import INDEX, check_weights, read_json

WEIGHTS = "model.safetensors"
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# what old checkpoints carry though every model computes it: rotary frequencies, position numbers
_COMPUTED = re.compile(r"rotary_emb\.inv_freq$|position_ids$")


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a safetensors file. dtype: as the file spells it. offset, nbytes: in bytes."""

    key: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    @property
    def torch_dtype(self) -> torch.dtype:
        """float32, float16 or bfloat16; UnsupportedError for any other, a quantised one say."""
        if self.dtype not in _DTYPES:
            raise UnsupportedError(
                found=f"{self.key} of type {self.dtype}",
                expected=f"one of {', '.join(_DTYPES)}",
                where=str(self.file),
                remedy="save the checkpoint in one of these types, dequantised",
            )
        return _DTYPES[self.dtype]

    @property
    def size(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)

    def read(self, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """The numbers start to stop in file order [stop - start], in a buffer of their own.

        The file is not mapped, so that nothing but the buffer is held. Raises IntegrityError if
        the file has become shorter.
        """
        width = self.torch_dtype.itemsize
        stop = self.size if stop is None else stop
        data = torch.empty((stop - start) * width, dtype=torch.uint8)
        view = data.numpy().data
        with self.file.open("rb", buffering=0) as handle:
            handle.seek(self.offset + start * width)
            while view:
                count = handle.readinto(view)
                if not count:
                    raise IntegrityError(
                        found=f"the end of the file within {self.key}",
                        expected=f"{self.nbytes} bytes from {self.offset}",
                        where=str(self.file),
                        remedy="let nothing else write to the checkpoint, and run it again",
                    )
                view = view[count:]
        return data.view(self.torch_dtype)


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of the checkpoint by its key: of model.safetensors, or of the index's shards.

    Raises what `check_weights` raises, and MalformedError for an index that its shards contradict
    or offsets that do not fit type and shape.
    """
    check_weights(folder)
    index = folder / INDEX
    if not index.is_file():
        if not (folder / WEIGHTS).is_file():
            raise UnsupportedError(
                found=f"neither {WEIGHTS} nor {INDEX}",
                expected="weights under the names that save_pretrained gives them",
                where=str(folder),
                remedy="save the checkpoint with save_pretrained",
            )
        return _tensors_in(folder / WEIGHTS)
    where: Mapping[str, str] = read_json(index).get("weight_map", {})
    shards = {name: _tensors_in(folder / name) for name in sorted(set(where.values()))}
    absent = sorted(key for key, name in where.items() if key not in shards[name])
    if absent:
        raise _malformed(
            f"no tensor {absent[0]} in {where[absent[0]]}", "what the index says", index
        )
    return {key: shards[name][key] for key, name in sorted(where.items())}


def parameters_in(folder: Path, model: PreTrainedModel) -> dict[str, StoredTensor]:
    """Where each parameter of the model lies, by its path; tied ones share a tensor.

    model: may be hollow. Keys are translated as transformers translates them when it loads. Raises
    MalformedError for a parameter that is missing or has another shape, UnsupportedError for a
    tensor that the model has no place for, or one that would have to be merged or split.
    """
    wanted = dict(model.named_parameters(remove_duplicate=False))
    stored = stored_tensors(folder)
    names = _translate(stored, model, wanted, folder)
    found: dict[str, StoredTensor] = {}
    for key, tensor in stored.items():
        name = names[key]
        if name in wanted:
            found[name] = tensor
        elif not _may_be_left(name, model):
            raise UnsupportedError(
                found=f"a tensor {key}, for which the model has no place",
                expected="the model's own parameters",
                where=str(folder),
                remedy="merge adapters and undo quantisation, then save the checkpoint again",
            )
    owners = {id(wanted[name]): tensor for name, tensor in found.items()}
    for name, parameter in wanted.items():
        at = found.get(name) or owners.get(id(parameter))
        if at is None or at.shape != tuple(parameter.shape):
            seen = "no tensor" if at is None else f"shape {list(at.shape)}"
            raise _malformed(f"{seen} for {name}", f"shape {list(parameter.shape)}", folder)
        _ = at.torch_dtype  # refuses what cannot be read
        found[name] = at
    return found


def _translate(
    keys: Iterable[str], model: PreTrainedModel, wanted: Mapping[str, Any], folder: Path
) -> dict[str, str]:
    """The parameter that transformers loads each key into."""
    changes = get_model_conversion_mapping(model)
    converters = [change for change in changes if isinstance(change, WeightConverter)]
    renamings: Any = [change for change in changes if not isinstance(change, WeightConverter)]
    names = {}
    for key in keys:
        names[key], converter = rename_source_key(
            key, renamings, converters, model.base_model_prefix, dict(wanted)
        )
        if converter is not None:
            raise UnsupportedError(
                found=f"{key}, which transformers merges or splits when it loads",
                expected="one tensor for each parameter",
                where=str(folder),
                remedy="load the checkpoint with transformers and save it again",
            )
    return names


def _may_be_left(name: str, model: PreTrainedModel) -> bool:
    """Whether transformers loads the model without this tensor and says nothing."""
    ignored = [re.compile(text) for text in model._keys_to_ignore_on_load_unexpected or ()]
    return any(pattern.search(name) for pattern in (_COMPUTED, *ignored))


def _tensors_in(file: Path) -> dict[str, StoredTensor]:
    with file.open("rb") as handle:
        (length,) = struct.unpack("<Q", handle.read(8))
        header = json.loads(handle.read(length))
    found = {}
    for key, entry in sorted(header.items()):
        if key == "__metadata__":
            continue
        try:
            start, end = entry["data_offsets"]
            shape = tuple(int(size) for size in entry["shape"])
            tensor = StoredTensor(
                key, file, str(entry["dtype"]), shape, 8 + length + start, end - start
            )
        except (KeyError, TypeError, ValueError) as error:
            raise _malformed(f"an entry for {key} without its place", "offsets", file) from error
        _require_room(tensor)
        found[key] = tensor
    return found


def _require_room(tensor: StoredTensor) -> None:
    if tensor.dtype not in _DTYPES:
        return  # of a size we do not know; refused when it is asked for
    expected = tensor.size * _DTYPES[tensor.dtype].itemsize
    if tensor.nbytes != expected or tensor.offset < 8:
        raise _malformed(
            f"{tensor.nbytes} bytes for {tensor.key}", f"{expected} for its shape", tensor.file
        )


def _malformed(found: str, expected: str, where: Path) -> MalformedError:
    return MalformedError(
        found=found,
        expected=expected,
        where=str(where),
        remedy="fetch or save the checkpoint again",
    )
