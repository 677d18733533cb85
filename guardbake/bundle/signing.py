"""A signature over a whole bundle, as the OpenSSF Model Signing specification 1.0 has it.

The manifest tells damage, and whoever can rewrite it can rewrite the bundle; a signature tells who
answers for it. Key-based alone: an elliptic-curve key (P-256, P-384 or P-521) in a PEM file, and
nothing is asked of a network. The signature is a file of its own beside the bundle, which other
people's `model_signing verify key` reads as well.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, NoReturn

from guardbake.bundle.folders import DiskFaults, beside, refuse_existing
from guardbake.errors import EnvironmentFault, IntegrityError, UsageError


def sign(bundle: Path, key: Path, signature: Path) -> None:
    """Sign every file of the bundle with the private `key`; `signature` appears whole or not.

    Reads every byte. Verify the bundle before: a signature says that somebody answers for it.
    Raises EnvironmentFault without the package model-signing, UsageError if `key` is none that can
    sign, or `signature` exists or would lie in the bundle.
    """
    signing = _library("signing")
    _require_outside(bundle, signature)
    refuse_existing(signature)
    try:
        config = signing.Config().use_elliptic_key_signer(private_key=key)
    except (OSError, TypeError, ValueError, AttributeError) as error:
        _refuse(f"{type(error).__name__}: {error}", "an unencrypted private EC key in PEM", key)
    partial = beside(signature, ".partial")
    with DiskFaults(signature.parent):
        try:
            config.sign(bundle, partial)
            os.rename(partial, signature)
        finally:
            partial.unlink(missing_ok=True)


def check_signature(bundle: Path, public_key: Path, signature: Path) -> None:
    """Every file of the bundle is as it was when the key's owner signed it, and none came or went.

    Reads every byte. Raises IntegrityError if not, UsageError if `public_key` is none,
    EnvironmentFault without the package model-signing.
    """
    verifying = _library("verifying")
    from cryptography.exceptions import InvalidSignature

    _require_outside(bundle, signature)
    try:
        config = verifying.Config().use_elliptic_key_verifier(public_key=public_key)
    except (OSError, TypeError, ValueError, AttributeError) as error:
        _refuse(f"{type(error).__name__}: {error}", "a public EC key in PEM", public_key)
    try:
        _require_whole(signature)
        config.verify(bundle, signature)
    except (InvalidSignature, OSError, LookupError, TypeError, ValueError) as error:
        raise IntegrityError(
            found=f"{type(error).__name__}: {error!s:.400}",
            expected="a signature of this key over these files",
            where=str(signature),
            remedy="do not ship this bundle: take it and its signature from their source",
        ) from error


def _require_whole(signature: Path) -> None:
    """ValueError if files may be left out: a signature of ours covers all of a bundle."""
    import base64

    envelope = json.loads(signature.read_text(encoding="utf-8"))["dsseEnvelope"]
    stated = json.loads(base64.b64decode(envelope["payload"]))["predicate"]["serialization"]
    git = {".git", ".gitattributes", ".github", ".gitignore"}  # which no manifest of ours lists
    left_out = sorted(set(stated.get("ignore_paths", [])) - git)
    if left_out:
        raise ValueError(f"a signature that leaves out {left_out[0]!r:.80}")


def _require_outside(bundle: Path, signature: Path) -> None:
    if bundle.resolve() in signature.resolve().parents:
        _refuse("a signature inside the bundle", "one beside it", signature)


def _library(name: str) -> Any:
    try:
        from model_signing import signing, verifying
    except ImportError as error:
        raise EnvironmentFault(
            found=f"no package model-signing ({error})",
            expected="the extra [sign]",
            where="this environment",
            remedy="install it with pip install 'guardbake[sign]'",
        ) from error
    return {"signing": signing, "verifying": verifying}[name]


def _refuse(found: str, expected: str, where: Path) -> NoReturn:
    raise UsageError(found=found, expected=expected, where=str(where), remedy="name another file")
