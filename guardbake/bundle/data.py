"""External data of a graph: each tensor outside the graph file lies whole in a file beside it.

The table of locations, offsets and lengths is part of a file that anybody may have written, so it
is believed in nothing. No byte of the data is read.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import onnx_ir as ir

from guardbake.bundle.files import unsafe
from guardbake.bundle.graphs import tensors_of
from guardbake.errors import IntegrityError, MalformedError

MAX_TENSORS = 1 << 17  # a 400-layer decoder of 4-bit blocks has a tenth of them
_SHOWN = 120  # characters of a name or location in an error


def check_external_data(model: ir.Model, path: Path) -> None:
    """Check the table of the graph that was read from `path`.

    Raises IntegrityError on a location that is not a file name, a file that is absent, a link or
    shared with another name by a hard link, and an offset or a length that its file does not have;
    MalformedError on a dtype whose values have no size.
    """
    sizes: dict[str, int] = {}
    for number, tensor in enumerate(external_tensors(model)):
        if number >= MAX_TENSORS:
            _amiss(f"more than {MAX_TENSORS} external tensors", "those of a decoder", path)
        location, what = str(tensor.location), f"tensor {str(tensor.name)[:_SHOWN]!r}"
        if "/" in location or unsafe(location):
            found = f"{what} at {location[:_SHOWN]!r}"
            _amiss(found, "the name of a file beside the graph", path)
        if location not in sizes:
            sizes[location] = _plain_size(path.parent / location, what, path)
        _check_range(tensor, sizes[location], what, path)


def _plain_size(file: Path, what: str, path: Path) -> int:
    """The size of a file that has one name and is nothing but a file."""
    shown = repr(file.name[:_SHOWN])
    try:
        state = os.lstat(file)
    except OSError:
        _amiss(f"{what} in {shown}, no plain file", "a file beside it", path)
    if not stat.S_ISREG(state.st_mode):
        _amiss(f"{what} in {shown}, no plain file", "a file beside it", path)
    if state.st_nlink != 1:
        _amiss(
            f"{what} in {shown}, which {state.st_nlink} hard links share",
            "a file that nobody else can write to",
            path,
        )
    return state.st_size


def _check_range(tensor: ir.ExternalTensor, size: int, what: str, path: Path) -> None:
    dims = [dim for dim in tensor.shape if isinstance(dim, int)]
    if len(dims) != len(tensor.shape) or any(dim < 0 for dim in dims):
        _amiss(f"{what} of shape {str(tensor.shape)[:_SHOWN]}", "sizes of 0 or more", path)
    offset, length, needed = tensor.offset or 0, tensor.length, stored_bytes(tensor, path)
    if length is not None and length != needed:
        _amiss(f"{what} with {length} bytes of data", f"{needed} bytes", path)
    if offset < 0 or offset + needed > size:
        found = f"{what} at bytes {offset} to {offset + needed} of {tensor.location!s:.120}"
        _amiss(found, f"bytes within its {size}", path)


def stored_bytes(tensor: ir.ExternalTensor, path: Path) -> int:
    """How many bytes the tensor's data has, by its dtype and shape; text, and what is of no dtype,
    has no such number: MalformedError."""
    try:
        return int(tensor.nbytes)
    except TypeError as error:
        raise MalformedError(
            found=f"tensor {str(tensor.name)[:_SHOWN]!r} of {tensor.dtype} outside the graph",
            expected="a dtype whose values have a size",
            where=str(path),
            remedy="export the model again",
        ) from error


def external_tensors(model: ir.Model) -> Iterator[ir.ExternalTensor]:
    """Initialisers and attributes of the graph, its subgraphs and its functions."""
    return (each for each in tensors_of(model) if isinstance(each, ir.ExternalTensor))


def _amiss(found: str, expected: str, where: Path) -> NoReturn:
    raise IntegrityError(
        found=found,
        expected=expected,
        where=str(where),
        remedy="do not ship this bundle: bake it again, or take it from its source",
    )
