"""What the whole suite shares: a quiet, repeatable hypothesis and small guards to test with."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import settings

from guardbake.site import Site
from guardbake.spec import Branch, Edit, EditKind, GuardSpec, ModelIdentity, Profile, Sensor

settings.register_profile("house", derandomize=True, deadline=None, max_examples=40, database=None)
settings.load_profile("house")


FIRST_RESIDUAL = Site(0, "residual")


def small_guard(
    profile: Profile = "sequence",
    kind: EditKind = "care",
    *,
    width: int = 16,
    layers: int = 3,
    sensor: Site = FIRST_RESIDUAL,
    edits: tuple[int, ...] = (2,),
    strength: float = 1.0,
    threshold: float = 0.1,
    family: str = "llava",
    seed: int = 0,
) -> GuardSpec:
    """A guard of random numbers, complete and valid, the same for the same arguments."""
    rng = np.random.default_rng(seed)

    def vector() -> np.ndarray:
        return rng.standard_normal(width).astype(np.float32)

    def branch(modality: str, rank: int) -> Branch:
        basis = np.linalg.qr(rng.standard_normal((width, rank)))[0].astype(np.float32)
        return Branch("visual" if modality == "visual" else "text", basis, vector(), strength)

    direction = vector()
    reads = Sensor(sensor, direction / np.linalg.norm(direction), vector(), threshold)
    changes = []
    for layer in edits:
        branches = {
            "care": lambda: (branch("visual", 3), branch("text", 2)),
            "project": lambda: (branch("text", 3),),
            "add": lambda: (branch("text", 3),),
            "steer": tuple,
        }[kind]()
        push = vector() if kind == "steer" else None
        own = strength if kind == "steer" else 1.0
        changes.append(Edit(Site(layer, "ffn_output"), kind, branches, push, own))
    identity = ModelIdentity(family, layers, width, "0" * 64)
    return GuardSpec(
        identity, "test", profile, None if profile == "always" else reads, tuple(changes), {"n": 3}
    )


@pytest.fixture(scope="session")
def guard() -> Callable[..., GuardSpec]:
    """`small_guard`, for tests that build guards."""
    return small_guard
