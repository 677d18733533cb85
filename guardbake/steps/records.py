"""Records that stages leave for one another: JSON objects in one spelling, and digests of files."""

from __future__ import annotations

import hashlib
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import guardbake
from guardbake.bundle.canonical import canonical_lines, parse
from guardbake.errors import MalformedError

_PACKAGES = (
    "torch",
    "transformers",
    "onnx-ir",
    "onnxscript",
    "onnxruntime",
    "numpy",
    "scipy",
    "pillow",
    "tensorrt-rtx",
)


def write_record(path: Path, value: Any) -> None:
    path.write_text(canonical_lines(value), encoding="utf-8")


def read_record(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; MalformedError if it is anything else."""
    remedy = "bake again"
    try:
        value = parse(path.read_bytes(), str(path), remedy)
    except OSError as error:
        raise _malformed(path, f"no readable file ({error.strerror})", remedy) from error
    if not isinstance(value, dict):
        raise _malformed(path, f"a JSON {type(value).__name__}", remedy)
    return value


def _malformed(path: Path, found: str, remedy: str) -> MalformedError:
    return MalformedError(found=found, expected="a JSON object", where=str(path), remedy=remedy)


def file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def folder_digest(folder: Path) -> str:
    """Over name and content of the files directly in `folder`."""
    lines = [f"{p.name} {file_digest(p)}" for p in sorted(folder.iterdir()) if p.is_file()]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def code_digest(package: str = "guardbake") -> str:
    """sha256 of a package's modules: what other code made is made again."""
    root = Path(str(import_module(package).__file__)).parent
    state = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        state.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return state.hexdigest()


def tool_versions() -> dict[str, str]:
    """Versions of the installed packages that a bake depends on."""
    found = {"guardbake": guardbake.__version__}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
