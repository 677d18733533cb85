"""GuardSpec: everything a guard is, and nothing else. Fitting ends here, graph code begins here.

Arrays are float32, C-contiguous and read-only. A spec is checked when it is made, so whoever holds
one need not check again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np

from guardbake.semantics import Fusion
from guardbake.site import Site
from guardbake.values import Vector, finite, json_copy, refuse, shows, vector

Profile = Literal["always", "token", "sequence"]
EditKind = Literal["care", "project", "add", "replace", "steer", "astra"]
Modality = Literal["visual", "text"]

VERSION = 3
POLARITY = "harmful-positive"
MAX_GATES = 32  # a bit each in the int64 `guard_state`, with room to spare
ORTHONORMAL = 1e-5  # |Q^T Q - I|, max; fp32 rounding of a basis orthonormal to 1e-10 gives 1e-6
_BRANCHES: Mapping[EditKind, int] = {
    "care": 2,
    "project": 1,
    "add": 1,
    "replace": 1,
    "steer": 0,
    "astra": 0,
}


@dataclass(frozen=True)
class ModelIdentity:
    """The model a guard belongs to. digest: sha256 over its weights and configuration files."""

    family: str
    layers: int
    width: int
    digest: str

    def __post_init__(self) -> None:
        for name, kind in (("family", str), ("layers", int), ("width", int), ("digest", str)):
            value = getattr(self, name)
            if type(value) is not kind:
                refuse("model identity", f"{name} {value!r}", f"a value of type {kind.__name__}")
        for text in (self.family, self.digest):
            if not shows(text):
                refuse("model identity", f"{text!r:.80}", "a text that can be shown")
        if self.layers < 1 or self.width < 1:
            refuse("model identity", f"{self.layers} layers of width {self.width}", "at least 1")


@dataclass(frozen=True, eq=False)
class Reading:
    """What a sensor takes from `site`: features (x - centre) D.

    directions D [d, C] float32, centre [d] float32. C = 1: the score's direction. C = 2: that, and
    the one whose features are averaged over the image tokens.
    """

    site: Site
    directions: Vector
    centre: Vector

    def __post_init__(self) -> None:
        where = f"sensor at {self.site}"
        object.__setattr__(self, "directions", vector(self.directions, (None, None), where))
        width, columns = self.directions.shape
        object.__setattr__(self, "centre", vector(self.centre, (width,), where))
        if columns not in (1, 2):
            refuse(where, f"{columns} columns", "1, or 2: last, pooled")


@dataclass(frozen=True, eq=False)
class Sensor:
    """The score of `semantics`: positive is harmful. readings in layer order, of one width.

    thresholds, in units of the score: one, or with two columns those of `semantics.pooled_score`.
    """

    readings: tuple[Reading, ...]
    thresholds: tuple[float, ...]

    def __post_init__(self) -> None:
        where = "sensor"
        sites = self.sites
        if not sites or sites != tuple(sorted(set(sites), key=lambda site: site.depth)):
            refuse(where, f"readings at {[str(s) for s in sites]}", "distinct sites in order")
        shapes = {reading.directions.shape for reading in self.readings}
        wanted = {2 * shape[1] - 1 for shape in shapes}
        if len(shapes) != 1 or wanted != {len(self.thresholds)}:
            found = f"{len(self.thresholds)} thresholds, directions {sorted(shapes)}"
            refuse(where, found, "one width, one threshold a column or three for two")
        for threshold in self.thresholds:
            finite(threshold, f"{where}: threshold")
        if not any(reading.directions[:, 0].any() for reading in self.readings):
            refuse(where, "a score that reads nothing", "a direction")

    @property
    def sites(self) -> tuple[Site, ...]:
        return tuple(reading.site for reading in self.readings)

    @property
    def pools(self) -> bool:
        """Whether image tokens are averaged: that takes their mask, and a memory between calls."""
        return len(self.thresholds) > 1

    @property
    def width(self) -> int:
        """d."""
        return int(self.readings[0].directions.shape[0])


def linear_sensor(site: Site, direction: Vector, centre: Vector, threshold: float) -> Sensor:
    """The plainest one: s = (x - centre) . direction - threshold at `site`, direction [d]."""
    column = np.asarray(direction)[:, None]
    return Sensor((Reading(site, column, centre),), (threshold,))


@dataclass(frozen=True, eq=False)
class Branch:
    """One subspace: basis [d, k] float32 with orthonormal columns, centre [d], strength alpha.

    gains [k] float32: how much of each coordinate counts; None is all of it. A projector U U^T onto
    columns that are not orthonormal is Q diag(gains) Q^T (eigenvectors and eigenvalues).
    """

    modality: Modality
    basis: Vector
    centre: Vector
    strength: float
    gains: Vector | None = None

    def __post_init__(self) -> None:
        where = f"{self.modality} branch"
        if self.modality not in get_args(Modality):
            refuse(where, repr(self.modality), f"one of {get_args(Modality)}")
        object.__setattr__(self, "basis", vector(self.basis, (None, None), where))
        width, rank = self.basis.shape
        if not 0 < rank <= width:
            refuse(where, f"a basis of shape {self.basis.shape}", "1 to d columns")
        object.__setattr__(self, "centre", vector(self.centre, (width,), where))
        finite(self.strength, f"{where}: strength")
        if self.gains is not None:
            object.__setattr__(self, "gains", vector(self.gains, (rank,), f"{where}: gains"))
        basis = self.basis.astype(np.float64)
        error = float(np.abs(basis.T @ basis - np.eye(rank)).max())
        if error > ORTHONORMAL:
            refuse(where, f"a basis with |Q^T Q - I| = {error:.3g}", f"at most {ORTHONORMAL}")


@dataclass(frozen=True, eq=False)
class Edit:
    """What happens to the FFN output at `site` while the gate is open (see `semantics`).

    branches: two for "care" (visual, text), none for "steer" and "astra", one for the others.
    push [d] float32 and strength: for "steer" and "astra" only; the others keep strength in their
    branches. reference [d] float32: for "astra" only, whose push has unit length.
    fusion: how "care" puts its branches together, else adaptive. gate: number of its sensor.
    """

    site: Site
    kind: EditKind
    branches: tuple[Branch, ...] = ()
    push: Vector | None = None
    strength: float = 1.0
    fusion: Fusion = "adaptive"
    reference: Vector | None = None
    gate: int = 0

    def __post_init__(self) -> None:
        where = f"edit at {self.site}"
        if type(self.gate) is not int or self.gate < 0:
            refuse(where, f"gate {self.gate!r}", "the number of a sensor")
        if self.kind not in get_args(EditKind):
            refuse(where, f"kind {self.kind!r}", f"one of {get_args(EditKind)}")
        if self.site.boundary != "ffn_output":
            refuse(where, f"boundary {self.site.boundary}", "ffn_output, the only edited boundary")
        if self.fusion not in get_args(Fusion):
            refuse(where, f"fusion {self.fusion!r}", f"one of {get_args(Fusion)}")
        if self.kind != "care" and self.fusion != "adaptive":
            refuse(where, f"fusion {self.fusion} of kind {self.kind}", "a fusion for care only")
        self._check_branches(where)
        self._check_push(where)

    def _check_branches(self, where: str) -> None:
        wanted = _BRANCHES[self.kind]
        if len(self.branches) != wanted:
            refuse(where, f"{len(self.branches)} branches", f"{wanted} for kind {self.kind}")
        if self.kind == "care" and [b.modality for b in self.branches] != ["visual", "text"]:
            refuse(where, f"{[b.modality for b in self.branches]}", "visual, then text")
        if self.kind == "replace" and self.branches[0].gains is not None:
            refuse(where, "gains for kind replace", "coordinates that are replaced whole")
        if len({b.basis.shape[0] for b in self.branches}) > 1:
            refuse(where, "branches of different width", "one width")
        finite(self.strength, f"{where}: strength")
        if self.branches and self.strength != 1:
            refuse(where, f"strength {self.strength} of the edit", "strengths in the branches")

    def _check_push(self, where: str) -> None:
        if (self.push is None) == (not self.branches):
            has = "no push" if self.push is None else "a push"
            refuse(where, f"{has} for kind {self.kind}", "a push iff there are no branches")
        if (self.reference is None) == (self.kind == "astra"):
            has = "no reference" if self.reference is None else "a reference"
            refuse(where, f"{has} for kind {self.kind}", "a reference iff astra")
        if self.push is not None:
            object.__setattr__(self, "push", vector(self.push, (None,), where))
        if self.reference is not None and self.push is not None:
            reference = vector(self.reference, self.push.shape, f"{where}: reference")
            object.__setattr__(self, "reference", reference)
            norm = float(np.linalg.norm(self.push.astype(np.float64)))
            if abs(norm - 1) > ORTHONORMAL:
                refuse(where, f"a push of length {norm:.6g}", "unit length for kind astra")

    @property
    def width(self) -> int:
        """d."""
        return len(self.push) if self.push is not None else self.branches[0].basis.shape[0]


@dataclass(frozen=True, eq=False)
class GuardSpec:
    """A whole guard: sensors with a gate each (none iff profile is "always"), one edit per site.

    sensors: in order of the last site each reads, at or before the edits that it opens. Only the
    first may pool: a lost memory opens all gates. method: name of the method that fitted it.
    provenance: JSON values that say how (sample digests, figures); they are part of the digest.
    """

    model: ModelIdentity
    method: str
    profile: Profile
    sensors: tuple[Sensor, ...]
    edits: tuple[Edit, ...]
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        where = "guard spec"
        if self.profile not in get_args(Profile):
            refuse(where, f"profile {self.profile!r}", f"one of {get_args(Profile)}")
        if not self.edits:
            refuse(where, "no edits", "at least one edit")
        if self.profile != "sequence" and any(edit.kind == "replace" for edit in self.edits):
            # the text-only pass goes through the same graph, and only a latched gate can be shut
            refuse(where, f"an edit replace in profile {self.profile}", "profile sequence")
        sites = [edit.site for edit in self.edits]
        if sites != sorted(set(sites), key=lambda site: site.depth):
            refuse(where, f"edits at {[str(s) for s in sites]}", "distinct sites in layer order")
        for site in [*sites, *(site for sensor in self.sensors for site in sensor.sites)]:
            if not 0 <= site.layer < self.model.layers:
                refuse(where, str(site), f"layers 0 to {self.model.layers - 1}")
        self._check_sensors(where)
        widths = {edit.width for edit in self.edits} | {each.width for each in self.sensors}
        if widths != {self.model.width}:
            refuse(where, f"widths {sorted(widths)}", f"the model's width {self.model.width}")
        if not isinstance(self.method, str) or not shows(self.method):
            refuse(where, f"method {self.method!r:.80}", "a name")
        object.__setattr__(self, "provenance", json_copy(self.provenance, f"{where}: provenance"))

    def _check_sensors(self, where: str) -> None:
        if bool(self.sensors) == (self.profile == "always"):
            found = f"profile {self.profile} {'with' if self.sensors else 'without'} a sensor"
            refuse(where, found, "a sensor iff gated")
        if len(self.sensors) > MAX_GATES:
            refuse(where, f"{len(self.sensors)} sensors", f"at most {MAX_GATES}")
        gates = sorted({edit.gate for edit in self.edits})
        if gates != list(range(len(self.sensors) or 1)):
            refuse(where, f"edits of the gates {gates}", "an edit for each sensor")
        ends = [sensor.sites[-1] for sensor in self.sensors]
        if ends != sorted(set(ends), key=lambda site: site.depth):
            refuse(where, f"sensors that end at {[str(s) for s in ends]}", "one after the other")
        for edit in self.edits if ends else ():
            if (end := ends[edit.gate]).depth > edit.site.depth:
                refuse(where, f"sensor at {end}", f"at or before the edit at {edit.site}")
        if self.pools and self.profile != "sequence":
            refuse(where, f"profile {self.profile}", "sequence, which a pooling sensor needs")
        if any(sensor.pools for sensor in self.sensors[1:]):
            refuse(where, "a later sensor that pools", "no sensor but the first to pool")

    @property
    def pools(self) -> bool:
        """Whether the first sensor averages image tokens."""
        return any(sensor.pools for sensor in self.sensors[:1])

    @property
    def digest(self) -> str:
        """sha256 over everything above: two guards are the same guard iff their digests are."""
        state = hashlib.sha256(header_json(self).encode())
        for name, array in tensors(self).items():
            state.update(f"{name}:{array.shape}".encode())
            state.update(array.astype("<f4").tobytes())
        return state.hexdigest()


def tensors(spec: GuardSpec) -> dict[str, Vector]:
    """The spec's arrays by stable name, in stable order."""
    out: dict[str, Vector] = {}
    for gate, sensor in enumerate(spec.sensors):
        for reading in sensor.readings:
            out[f"sensor.{gate}.{reading.site}.directions"] = reading.directions
            out[f"sensor.{gate}.{reading.site}.centre"] = reading.centre
    for edit in spec.edits:
        for branch in edit.branches:
            out[f"{edit.site}.{branch.modality}.basis"] = branch.basis
            out[f"{edit.site}.{branch.modality}.centre"] = branch.centre
            if branch.gains is not None:
                out[f"{edit.site}.{branch.modality}.gains"] = branch.gains
        if edit.push is not None:
            out[f"{edit.site}.push"] = edit.push
        if edit.reference is not None:
            out[f"{edit.site}.reference"] = edit.reference
    return out


def header(spec: GuardSpec) -> dict[str, Any]:
    """Everything but the arrays, as JSON values."""
    return {
        "version": VERSION,
        "polarity": POLARITY,
        "method": spec.method,
        "profile": spec.profile,
        "model": {
            "family": spec.model.family,
            "layers": spec.model.layers,
            "width": spec.model.width,
            "digest": spec.model.digest,
        },
        "sensors": [
            {
                "sites": [str(site) for site in sensor.sites],
                "thresholds": [float(threshold) for threshold in sensor.thresholds],
            }
            for sensor in spec.sensors
        ],
        "edits": [
            {
                "site": str(edit.site),
                "gate": edit.gate,
                "kind": edit.kind,
                "strength": float(edit.strength),
                "fusion": edit.fusion,
                "branches": [
                    {"modality": b.modality, "strength": float(b.strength)} for b in edit.branches
                ],
            }
            for edit in spec.edits
        ],
        "provenance": dict(spec.provenance),
    }


def header_json(spec: GuardSpec) -> str:
    """The header in its one canonical spelling."""
    return json.dumps(header(spec), sort_keys=True, separators=(",", ":"), allow_nan=False)
