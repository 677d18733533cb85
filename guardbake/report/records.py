"""The records that stages leave, found in folders, checked, and shown to be of one bake."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from guardbake.bundle.canonical import JSON, canonical, digest_of, parse
from guardbake.errors import MalformedError, UsageError
from guardbake.report.schema import (
    Behaviour,
    Certificate,
    Diagnosis,
    Evaluation,
    Fit,
    Parity,
    Study,
)

_SCHEMAS: Mapping[str, type[BaseModel]] = {
    "certificate": Certificate,
    "fit": Fit,
    "diagnosis": Diagnosis,
    "behaviour": Behaviour,
    "parity": Parity,
    "evaluation": Evaluation,
}
NAMES = tuple(_SCHEMAS)
INSIDE = "inside certificate.json"
_REMEDY = "let guardbake write it again"
R = TypeVar("R", bound=BaseModel)


@dataclass(frozen=True)
class Records:
    """What was found. origin[name]: the file's sha256, or that it stands in the certificate.
    plain[name]: the JSON values, for what draws from them."""

    certificate: Certificate | None
    fit: Fit | None
    diagnosis: Diagnosis | None
    behaviour: Behaviour | None
    parity: Parity | None
    evaluation: Evaluation | None
    studies: tuple[Study, ...]
    origin: Mapping[str, str]
    plain: Mapping[str, Mapping[str, Any]]

    @property
    def missing(self) -> tuple[str, ...]:
        return tuple(name for name in NAMES if name not in self.origin)


def read_records(folders: Sequence[Path]) -> Records:
    """Every record that stands directly in one of the folders, or inside a certificate there.

    Raises UsageError for a folder that is not there, none with a record, two unequal records of
    one name, and records of different models or bakes; MalformedError for a record that is not
    what its name says.
    """
    origin: dict[str, str] = {}
    plain: dict[str, Mapping[str, Any]] = {}
    for folder in folders:
        if not folder.is_dir():
            raise _mixed("no folder", "a folder that a stage wrote", str(folder))
        for name in NAMES:
            path = folder / f"{name}.json"
            if not path.is_file():
                continue
            data = path.read_bytes()
            digest = hashlib.sha256(data).hexdigest()
            if origin.setdefault(name, digest) != digest:
                raise _mixed(f"two different {name}.json", "one of a kind", str(path))
            plain[name] = _object(parse(data, str(path), _REMEDY), path.name)
        _read_study(folder / "study.json", plain, origin)
    if not plain:
        raise _mixed(
            "no record",
            f"one of {', '.join(f'{n}.json' for n in (*NAMES, 'study'))}",
            "the folders",
        )
    certificate = _checked(Certificate, plain, "certificate", origin)
    if certificate is not None:
        _unpack(certificate, plain, origin)
    studies = [_checked(Study, plain, name, origin) for name in sorted(plain) if name not in NAMES]
    found = Records(
        certificate,
        _checked(Fit, plain, "fit", origin),
        _checked(Diagnosis, plain, "diagnosis", origin),
        _checked(Behaviour, plain, "behaviour", origin),
        _checked(Parity, plain, "parity", origin),
        _checked(Evaluation, plain, "evaluation", origin),
        tuple(study for study in studies if study is not None),
        origin,
        plain,
    )
    _demand_one_model(found)
    return found


def _read_study(path: Path, plain: dict[str, Mapping[str, Any]], origin: dict[str, str]) -> None:
    """Studies are told apart by what they are of; there may be any number."""
    if not path.is_file():
        return
    data = path.read_bytes()
    content = _object(parse(data, str(path), _REMEDY), path.name)
    name, digest = f"study {content.get('study')!s:.40}", hashlib.sha256(data).hexdigest()
    if origin.setdefault(name, digest) != digest:
        raise _mixed(f"two different records of {name}", "one of a kind", str(path))
    plain[name] = content


def _unpack(
    certificate: Certificate, plain: dict[str, Mapping[str, Any]], origin: dict[str, str]
) -> None:
    """A certificate holds the records behind its gates: take them, or show that they are equal."""
    for name in ("fit", "behaviour", "parity"):
        if name not in certificate.figures:
            continue
        inside = _object(certificate.figures[name], f"certificate.json, {name}")
        if name in plain and digest_of(_json(plain[name])) != digest_of(_json(inside)):
            raise _mixed(
                f"{name}.json that is not the one in certificate.json",
                "records of one bake",
                f"{name}.json",
            )
        if name not in plain:
            plain[name], origin[name] = inside, INSIDE


def _json(value: Mapping[str, Any]) -> JSON:
    return dict(value)


def _object(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise MalformedError(
            found=f"a JSON {type(value).__name__}",
            expected="a JSON object",
            where=where,
            remedy=_REMEDY,
        )
    return value


def _checked(
    schema: type[R],
    plain: Mapping[str, Mapping[str, Any]],
    name: str,
    origin: Mapping[str, str],
) -> R | None:
    if name not in plain:
        return None
    try:
        return schema.model_validate_json(canonical(_json(plain[name])))
    except ValidationError as error:
        problems = [
            f"{'.'.join(str(part)[:40] for part in problem['loc'])}: {problem['msg']}"
            for problem in error.errors(include_url=False, include_input=False)[:5]
        ]
        raise MalformedError(
            found="; ".join(problems),
            expected=f"what the stage writes as {name}.json",
            where=f"{name}, {INSIDE}" if origin[name] == INSIDE else f"{name}.json",
            remedy=_REMEDY,
        ) from error


def _demand_one_model(found: Records) -> None:
    models = {
        "certificate": found.certificate and found.certificate.digests.model,
        "diagnosis": found.diagnosis and found.diagnosis.model,
        "evaluation": found.evaluation and found.evaluation.model,
        **{f"study {study.study}": study.model for study in found.studies},
    }
    named = {name: digest for name, digest in models.items() if digest}
    if len(set(named.values())) > 1:
        shown = ", ".join(f"{name} of {digest[:12]!r}" for name, digest in named.items())
        raise _mixed(shown, "records of one model", "the records")


def _mixed(found: str, expected: str, where: str) -> UsageError:
    return UsageError(
        found=found,
        expected=expected,
        where=where,
        remedy="give the folders of one bake",
    )
