"""What a guard knows of the tokens of a call: every mask, state and memory, against the law."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from guardbake.site import Site
from guardbake.spec import GuardSpec

from tests.passes.conftest import agree, feeds_for

ROWS, PAST, NEW = 600, 3, 3


def every_call(lab: Any, spec: GuardSpec) -> dict[str, Any]:
    """Random masks, some rows of padding alone; each state; a memory of these tokens, or others."""
    rng = np.random.default_rng(5)
    feeds = feeds_for(lab, spec, batch=ROWS, tokens=NEW)
    mask = (rng.random((ROWS, PAST + NEW)) < rng.choice([0.2, 0.5, 0.9], (ROWS, 1))).astype(int)
    before = mask[:, :PAST].sum(axis=1)
    feeds["attention_mask"] = mask
    if spec.profile == "sequence":
        states = range(-PAST - NEW - 2, 2 ** len(spec.sensors) + 1)
        feeds["guard_state"] = rng.choice(states, ROWS)
    if spec.pools:
        feeds["guard_memory"][:, 0] = rng.standard_normal(ROWS)
        feeds["guard_memory"][:, 1] = rng.integers(0, 3, ROWS)
        feeds["guard_memory"][:, 2] = np.where(rng.random(ROWS) < 0.6, before, before + 1)
    return feeds


@pytest.mark.parametrize("gates", [1, 2])
@pytest.mark.parametrize(
    ("profile", "pools"), [("token", False), ("sequence", False), ("sequence", True)]
)
def test_every_call_is_as_the_law_says(
    lab: Any, guard: Any, profile: str, pools: bool, gates: int
) -> None:
    later = (Site(1, "residual"),) if gates == 2 else ()
    spec = guard(profile, "steer", later=later, edits=(1, 2) if later else (2,), pools=pools)
    toy, feeds = lab.toy(), every_call(lab, spec)
    expected = toy.law(spec, feeds)
    for name in [name for name in expected if name.startswith("guard_open")]:
        assert 0.1 < expected[name].mean() < 0.9
    if profile == "sequence":
        decided = feeds["guard_state"] > 0, expected["guard_state_out"] > 0
        fed = feeds["attention_mask"][:, PAST:].any(axis=1)
        # before this call, in it or not yet; with new tokens and without
        assert len({*zip(*decided, fed, strict=True)}) == 6
    agree(lab.run(lab.insert(toy, spec), feeds), expected)
