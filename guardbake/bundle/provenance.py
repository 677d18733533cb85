"""Who made what from what: an in-toto statement with a SLSA provenance predicate.

in-toto Attestation Framework 1.0, Statement v1; SLSA 1.0, Provenance v1. Not signed here: a
signature over the bundle covers it, see `guardbake sign`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from guardbake.bundle.canonical import JSON
from guardbake.bundle.files import FileEntry
from guardbake.bundle.manifest import Origins

STATEMENT = "https://in-toto.io/Statement/v1"
PREDICATE = "https://slsa.dev/provenance/v1"
BUILD_TYPE = "urn:guardbake:bake:1"  # external parameters: the recipe, whole


def statement(entries: Sequence[FileEntry], origins: Origins, recipe: Any) -> JSON:
    """subject: every file. resolvedDependencies: source model, samples by split, tools.

    A digest over several files is no sha256 of any one of them, and so is called by names of ours:
    `guardbakeModel` of a checkpoint, `guardbakeSamples` of a split's requests.
    """
    dependencies: list[JSON] = [{"name": "model", "digest": {"guardbakeModel": origins.model}}]
    for split, digest in sorted(origins.samples.items()):
        dependencies.append({"name": f"samples/{split}", "digest": {"guardbakeSamples": digest}})
    for name, version in sorted(origins.tools.items()):
        dependencies.append({"name": name, "uri": f"pkg:pypi/{name}@{version}"})
    return {
        "_type": STATEMENT,
        "subject": [{"name": e.name, "digest": {"sha256": e.sha256}} for e in entries],
        "predicateType": PREDICATE,
        "predicate": {
            "buildDefinition": {
                "buildType": BUILD_TYPE,
                "externalParameters": {"recipe": recipe},
                "resolvedDependencies": dependencies,
            },
            "runDetails": {
                "builder": {
                    "id": "urn:guardbake:builder:local",
                    "version": dict(origins.tools),
                }
            },
        },
    }
