"""What a bundle is made of: a machine-learning bill of materials, CycloneDX 1.6 (ECMA-424)."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from guardbake.bundle.canonical import JSON, digest_of
from guardbake.bundle.files import FileEntry, entries_to_json
from guardbake.bundle.manifest import Origins
from guardbake.check.record import Certificate

_NAMESPACE = uuid.UUID("6f1d3e0a-6a53-5c65-9d55-2f6a3c9b7e10")  # of guardbake's serial numbers
BUNDLE, MODEL, GUARD = "bundle", "model", "guard"  # references inside the document


@dataclass(frozen=True)
class Contents:
    """entries: the bundle's files but for its papers."""

    entries: Sequence[FileEntry]
    origins: Origins
    certificate: Certificate


def bill_of_materials(contents: Contents) -> JSON:
    """The document: the guarded model, and as its components source model, guard, samples, files.

    A serial number is asked for: it is drawn from the digests, so equal bundles have the same.
    """
    key: JSON = [entries_to_json(contents.entries), dict(contents.origins.tools)]
    parts = [_model(contents), _guard(contents), *_samples(contents), *_files(contents)]
    libraries = [_library(n, v) for n, v in sorted(contents.origins.tools.items())]
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{uuid.uuid5(_NAMESPACE, digest_of(key))}",
        "version": 1,
        "metadata": {
            "tools": {"components": [t for t in libraries if t["name"] == "guardbake"]},
            "component": _bundle(contents),
        },
        "components": [*parts, *(t for t in libraries if t["name"] != "guardbake")],
        "dependencies": [
            {"ref": BUNDLE, "dependsOn": [str(part["bom-ref"]) for part in parts]},
            {"ref": GUARD, "dependsOn": [MODEL, *_splits(contents)]},
        ],
    }


def _bundle(contents: Contents) -> JSON:
    certificate = contents.certificate
    return {
        "type": "machine-learning-model",
        "bom-ref": BUNDLE,
        "name": certificate.name,
        "version": contents.origins.guard,
        "modelCard": {
            "modelParameters": {
                "task": "image-text-to-text",
                "datasets": [{"ref": split} for split in _splits(contents)],
            },
            "quantitativeAnalysis": {"performanceMetrics": _metrics(certificate)},
        },
        "properties": _properties(
            {
                "verdict": certificate.verdict,
                **{f"level:{level}": status for level, status in certificate.levels.items()},
            }
        ),
    }


def _metrics(certificate: Certificate) -> list[JSON]:
    """Refusals on held-out prompts, with 95 % intervals; what the certificate's table holds."""
    rows: list[dict[str, Any]] = certificate.figures.behaviour.get("table", {}).get("rows", [])
    return [
        {
            "type": "share refused",
            "slice": f"{row['arm']}, {row['label']} {row['family']}",
            "value": f"{row['refused']['value']:.4f}",
            "confidenceInterval": {
                "lowerBound": f"{row['refused']['low']:.4f}",
                "upperBound": f"{row['refused']['high']:.4f}",
            },
        }
        for row in rows
    ]


def _model(contents: Contents) -> dict[str, JSON]:
    """A digest over several files is no hash of a file, and so stands among the properties."""
    return {
        "type": "machine-learning-model",
        "bom-ref": MODEL,
        "name": "source checkpoint",
        "properties": _properties({"model": contents.origins.model}),
    }


def _guard(contents: Contents) -> dict[str, JSON]:
    facts = {"guard": contents.origins.guard}
    chosen = contents.certificate.figures.fit.get("chosen")
    return {
        "type": "machine-learning-model",
        "bom-ref": GUARD,
        "name": "guard",
        "version": contents.origins.guard,
        "properties": _properties(facts | ({"chosen": str(chosen)} if chosen else {})),
    }


def _splits(contents: Contents) -> list[str]:
    return [f"samples/{split}" for split in sorted(contents.origins.samples)]


def _samples(contents: Contents) -> list[dict[str, JSON]]:
    return [
        {
            "type": "data",
            "bom-ref": f"samples/{split}",
            "name": f"samples/{split}",
            "data": [{"type": "dataset", "name": split}],
            "properties": _properties({"samples": digest}),
        }
        for split, digest in sorted(contents.origins.samples.items())
    ]


def _files(contents: Contents) -> list[dict[str, JSON]]:
    return [
        {
            "type": "file",
            "bom-ref": f"file/{entry.name}",
            "name": entry.name,
            "hashes": [{"alg": "SHA-256", "content": entry.sha256}],
        }
        for entry in contents.entries
    ]


def _library(name: str, version: str) -> dict[str, JSON]:
    purl = f"pkg:pypi/{name}@{version}"
    return {
        "type": "library",
        "bom-ref": purl,
        "name": name,
        "version": version,
        "purl": purl,
    }


def _properties(facts: dict[str, str]) -> JSON:
    return [{"name": f"guardbake:{key}", "value": value} for key, value in sorted(facts.items())]
