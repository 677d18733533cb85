"""What certificate.json holds, strictly: unknown keys, wrong types and numbers that are not finite
are refused, and a verdict that its gates do not bear out.

`certificate.schema.json` beside this module is the same as JSON Schema, for other people's tools;
`python -m guardbake.check.record` writes it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from guardbake.check.certificate import SCHEMA, Gate, Status, Verdict, graded, verdict
from guardbake.check.levels import LEVEL_OF, Level
from guardbake.errors import MalformedError

SCHEMA_FILE = "certificate.schema.json"
Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=0)]


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class GateRecord(_Record):
    name: str
    level: Level
    status: Status
    detail: str

    @model_validator(mode="after")
    def _on_its_level(self) -> GateRecord:
        if LEVEL_OF.get(self.name) != self.level:
            raise ValueError(f"gate {self.name!r:.40} does not stand on the level {self.level}")
        return self


class Digests(_Record):
    model: Digest
    guard: Digest
    onnx: dict[str, Digest]


class ComparisonRecord(_Record):
    """worst: "inf" or "nan" where it is no number. limit: null where none is allowed."""

    gate: str
    quantity: str
    worst: float | Literal["inf", "nan"]
    limit: float | None
    source: str
    compared: Count
    where: str
    passed: bool


class Bin(_Record):
    """Decisions whose margin |score| is at least `above` and, unless null, below `below`."""

    above: float
    below: float | None
    decisions: Count


class ParityRecord(_Record):
    passed: bool
    comparisons: list[ComparisonRecord] = Field(min_length=1)
    flips_in_band: Count
    decisions: Count
    margins: dict[str, float]
    histogram: list[Bin]


class Figures(_Record):
    """The reports behind the gates. engine: its record, or why there is none."""

    fit: dict[str, Any]
    rewrite: dict[str, Any]
    parity: ParityRecord
    behaviour: dict[str, Any]
    engine: dict[str, Any] | str


class Certificate(_Record):
    """schema: the number of this layout. digests: what is certified, guard and ONNX graphs by file.

    verdict: of the gates that were asked. levels: pass only if every gate of a level passed.
    """

    version: Literal[2] = Field(alias="schema")
    name: str
    verdict: Verdict
    levels: dict[Level, Status]
    gates: list[GateRecord] = Field(min_length=1)
    digests: Digests
    figures: Figures

    @model_validator(mode="after")
    def _borne_out(self) -> Certificate:
        assert self.version == SCHEMA
        gates = [Gate(gate.name, gate.status, gate.detail) for gate in self.gates]
        if self.verdict != verdict(gates) or self.levels != graded(gates):
            raise ValueError("verdict or levels that the gates do not bear out")
        failed = {row.gate for row in self.figures.parity.comparisons if not row.passed}
        said = {gate.name for gate in gates if gate.status == "fail"}
        if not failed <= said:
            raise ValueError(f"gates {sorted(failed - said)} that a comparison says have failed")
        return self


def read_certificate(value: Any, where: str) -> Certificate:
    """The certificate in a JSON value; MalformedError names what is not as the schema says."""
    try:
        return Certificate.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(part) for part in first["loc"]) or "the whole"
        raise MalformedError(
            found=f"{place:.120}: {first['msg']:.200}",
            expected=f"a certificate of schema {SCHEMA}",
            where=where,
            remedy="bake again with this version, or read it with the version that wrote it",
        ) from error


def json_schema() -> dict[str, Any]:
    """The record as JSON Schema, draft 2020-12."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **Certificate.model_json_schema(by_alias=True),
    }


if __name__ == "__main__":
    text = json.dumps(json_schema(), indent=2, sort_keys=True) + "\n"
    Path(__file__).with_name(SCHEMA_FILE).write_text(text, encoding="utf-8")
