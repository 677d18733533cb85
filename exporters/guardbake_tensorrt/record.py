"""What is known about an engine once it is built: enough to say later what is inside."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from typing import Any, Final, Literal

from guardbake.errors import GuardbakeError, MalformedError

from guardbake_tensorrt.profile import EngineProfile

STATUS: Final = "compiled"


@dataclass(frozen=True)
class GuardLayers:
    """A guard node of the ONNX graph and the names of the network layers it became."""

    node: str
    layers: tuple[str, ...]


@dataclass(frozen=True)
class EngineRecord:
    """One engine. `status` is always "compiled": no engine is run on the machine that builds it.

    capabilities: "SM89" and the like, in the order asked for. graph: name of the graph file, and
    onnx_sha256 its digest; data_sha256: (file name, digest) of each external data file, because the
    graph alone does not tell one set of weights from another. engine_sha256 identifies this file
    only: two builds of one graph differ in bytes. engine_bytes: size of the file. guard_digest:
    `GuardSpec.digest`, None if the graph carries no guard; guard: what became of its nodes. layers:
    of the network, all of them, before the builder fuses any. settings: (name, value) of the
    builder. Raises MalformedError for any other status.
    """

    backend: str
    version: str
    status: Literal["compiled"]
    capabilities: tuple[str, ...]
    profile: EngineProfile
    graph: str
    onnx_sha256: str
    data_sha256: tuple[tuple[str, str], ...]
    engine_sha256: str
    engine_bytes: int
    guard_digest: str | None
    guard: tuple[GuardLayers, ...]
    layers: int
    settings: tuple[tuple[str, str], ...]
    seconds: float
    warnings: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.status != STATUS:
            raise _malformed(f"status {self.status!r}", f"{STATUS!r}: nothing here ran the engine")

    @property
    def guard_layers(self) -> int:
        """How many of the network's layers the guard became."""
        return len({layer for each in self.guard for layer in each.layers})

    def to_json(self) -> str:
        """Sorted keys, two spaces, a newline at the end."""
        return json.dumps(asdict(self), indent=2, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str) -> EngineRecord:
        """The record that `to_json` wrote; raises MalformedError on anything else."""
        try:
            found = json.loads(text)
        except json.JSONDecodeError as error:
            raise _malformed(f"text that is no JSON ({error})", "a JSON object") from error
        names = {field.name for field in fields(cls)}
        if not isinstance(found, dict) or found.keys() != names:
            keys = sorted(found) if isinstance(found, dict) else type(found).__name__
            raise _malformed(f"keys {keys}", f"the keys {sorted(names)}")
        try:
            return cls(**_typed(found))
        except (TypeError, KeyError, ValueError) as error:
            raise _malformed(f"a field of the wrong kind ({error})", "the kinds named") from error
        except GuardbakeError as error:
            raise _malformed(error.found, error.expected) from error


def _typed(found: dict[str, Any]) -> dict[str, Any]:
    """JSON has no tuples and no classes; these are the fields that had them."""
    profile = {name: _tuples(value) for name, value in found["profile"].items()}
    return found | {
        "profile": EngineProfile(**profile),
        "guard": tuple(GuardLayers(g["node"], tuple(g["layers"])) for g in found["guard"]),
        "engine_bytes": int(found["engine_bytes"]),
        "layers": int(found["layers"]),
        "seconds": float(found["seconds"]),
        **{
            name: _tuples(found[name])
            for name in ("capabilities", "data_sha256", "settings", "warnings")
        },
    }


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


def _malformed(found: str, expected: str) -> MalformedError:
    return MalformedError(
        found=found,
        expected=expected,
        where="an engine record",
        remedy="build the engine again; its record is written with it",
    )
