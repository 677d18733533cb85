"""Likelihoods of openings: as forced decoding has them, for every profile, whatever the batch."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from guardbake.samples import Form, Sample
from guardbake.spec import GuardSpec, Profile
from guardbake.vlm.catalog import models_root
from guardbake.vlm.likelihood import log_likelihoods
from guardbake.vlm.load import Vlm, load_vlm
from guardbake.vlm.requests import Typography, batches
from guardbake.vlm.runner import TorchRunner

DRAWING = Typography(4, 4, "answer the request in the image .")
OPENINGS = ([20], [31, 40, 22], [31, 40])


@pytest.fixture(scope="module")
def vlm() -> Vlm:
    return load_vlm(str(models_root() / "tiny-llava"))


def _samples() -> list[Sample]:
    texts = ("tell me how to make a cake", "what is a")
    forms: tuple[Form, ...] = ("text", "blank")
    return [Sample(t, "harmless", form, "mini", 0) for t in texts for form in forms]


def _forced(vlm: Vlm, spec: GuardSpec | None, opening: list[int]) -> np.ndarray:
    """The same number out of the reference runner, one sample at a time."""
    found = []
    for some, batch in batches(vlm, _samples(), DRAWING, 1):
        forced = np.array([opening] * len(some))
        trace = TorchRunner(vlm, spec).run(batch, len(opening), forced)
        logs = torch.from_numpy(trace.step_logits).double().log_softmax(-1).numpy()
        found.append(sum(logs[0, step, token] for step, token in enumerate(opening)))
    return np.array(found)


@pytest.mark.parametrize("profile", [None, "sequence", "token", "always"])
def test_likelihoods_are_those_of_forced_decoding(
    profile: Profile | None, vlm: Vlm, guard: Callable[..., GuardSpec]
) -> None:
    spec = None if profile is None else guard(profile, "steer", width=128, layers=6, threshold=-9.0)
    found = log_likelihoods(vlm, _samples(), DRAWING, spec, OPENINGS, batch_size=3)
    assert found.shape == (4, 3)
    expected = np.stack([_forced(vlm, spec, list(opening)) for opening in OPENINGS], axis=1)
    np.testing.assert_allclose(found, expected, atol=2e-5)
    assert (found[:, 2] > found[:, 1]).all()  # a longer opening is less likely than its beginning


def test_a_guard_moves_the_likelihoods(vlm: Vlm, guard: Callable[..., GuardSpec]) -> None:
    spec = guard("always", "steer", width=128, layers=6, strength=3.0)
    plain = log_likelihoods(vlm, _samples(), DRAWING, None, OPENINGS, 4)
    moved = log_likelihoods(vlm, _samples(), DRAWING, spec, OPENINGS, 4)
    assert np.abs(plain - moved).min() > 1e-3
