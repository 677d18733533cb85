"""The papers of a bundle: an ML-BOM (CycloneDX 1.6) and a provenance statement (in-toto, SLSA 1).

Both are made from what the bundle holds and from nothing else: files and digests, the chain of the
manifest, certificate and recipe. So equal bundles have equal papers, whoever verifies a
bundle can make them again, and no clock, host or user is in them.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from guardbake.bundle.canonical import JSON, canonical_lines, parse
from guardbake.bundle.files import FileEntry, describe, list_files
from guardbake.bundle.manifest import CERTIFICATE, MANIFEST, RECIPE, Manifest, Origins
from guardbake.bundle.provenance import statement
from guardbake.bundle.sbom import Contents, bill_of_materials
from guardbake.check.record import read_certificate
from guardbake.errors import IntegrityError

SBOM, PROVENANCE = "sbom.cdx.json", "provenance.json"
_REMEDY = "do not ship this bundle: bake it again, or take it from its source"


def seal(folder: Path, origins: Origins) -> Manifest:
    """Write the papers into a folder that holds all else, and say what its manifest is.

    Raises MalformedError if certificate or recipe are not what they should be.
    """
    names = [name for name in list_files(folder) if name not in (MANIFEST, SBOM, PROVENANCE)]
    entries = [describe(folder, name) for name in names]
    for name, text in papers_of(folder, entries, origins).items():
        (folder / name).write_text(text, encoding="utf-8")
        entries.append(describe(folder, name))
    return Manifest(tuple(sorted(entries, key=lambda entry: entry.name)), origins)


def check_papers(folder: Path, manifest: Manifest) -> None:
    """Both papers are what the bundle makes of itself; IntegrityError at the first that is not."""
    for name, text in papers_of(folder, manifest.files, manifest.origins).items():
        path = folder / name
        if not path.is_file() or path.read_bytes() != text.encode():
            raise IntegrityError(
                found="another text" if path.is_file() else "no such file",
                expected="what follows from the bundle's own files",
                where=str(path),
                remedy=_REMEDY,
            )


def papers_of(folder: Path, entries: Iterable[FileEntry], origins: Origins) -> dict[str, str]:
    """The text of each paper by file name. entries: of the bundle's files; papers are left out."""
    others = [entry for entry in entries if entry.name not in (SBOM, PROVENANCE)]
    said = read_certificate(_read(folder / CERTIFICATE), str(folder / CERTIFICATE))
    recipe = _read(folder / RECIPE)
    papers: dict[str, JSON] = {
        SBOM: bill_of_materials(Contents(others, origins, said)),
        PROVENANCE: statement(others, origins, recipe),
    }
    return {name: canonical_lines(value) for name, value in papers.items()}


def _read(path: Path) -> Any:
    return parse(path.read_bytes(), str(path), _REMEDY)
