"""One text fed in several ways: ways that matter are seen, and rounding at a threshold is not."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from guardbake.batch import Batch
from guardbake.check.comparison import Budget, Budgets
from guardbake.check.feeding import fed_otherwise, same_however_fed
from guardbake.plugins import Trace

OWN = "a test's own"
BUDGETS = Budgets(*(Budget(1e-3, OWN),) * 3, margin_band=Budget(1e-2, OWN), cache=Budget(1e-4, OWN))
VOCABULARY = 11


class Counter:
    """A runner whose logits are the number of real tokens so far; `slip` is added where it fails.

    slip: "padding" if columns are counted, "batch" if other rows are, "chunk" if pieces are.
    """

    def __init__(self, slip: str = "") -> None:
        self.slip = slip

    def run(
        self,
        batch: Batch,
        steps: int,
        forced_tokens: np.ndarray | None = None,
        chunk: int | None = None,
        keep_prefill: bool = True,
    ) -> Trace:
        assert forced_tokens is not None
        rows, columns = batch.input_ids.shape
        count = batch.attention_mask.cumsum(axis=1).astype(np.float32)
        count += {"padding": columns, "batch": rows, "chunk": chunk or 0, "": 0}[self.slip]
        new = count[:, -1:] + np.arange(steps)
        scores = np.zeros((rows, columns + steps - 1, 1), np.float32)
        scores[:, columns - 1 - batch.answered] = -5e-3
        return Trace(
            tokens=forced_tokens,
            prefill_logits=np.repeat(count[..., None], VOCABULARY, axis=2),
            step_logits=np.repeat(new[..., None], VOCABULARY, axis=2).astype(np.float32),
            lengths=np.full(rows, steps),
            valid=batch.attention_mask == 1,
            guard_score=scores,
            guard_open=scores > 0,
            guard_state=np.ones(rows, np.int64),
            taps={},
        )


@pytest.fixture
def batch() -> Batch:
    ids = np.arange(2, 14).reshape(3, 4)
    mask = np.array([[1, 1, 1, 1], [0, 1, 1, 1], [0, 0, 1, 1]])
    return Batch(ids, mask, np.zeros((3, 4), bool), None, None)


def broken(batch: Batch, slip: str) -> list[str]:
    runner = Counter(slip)
    whole = runner.run(batch, 3, np.ones((3, 3), np.int64))
    found = same_however_fed(fed_otherwise(runner, batch, whole), whole, BUDGETS)
    assert len(found) == 4
    assert all(each.compared == 9 for each in found)
    return [each.quantity.removeprefix("logits, ") for each in found if not each.passed]


@pytest.mark.parametrize(
    ("slip", "ways"),
    [
        ("", []),
        ("padding", ["padded by 5 more", "in one call without a cache", "each alone"]),
        ("batch", ["each alone"]),
        ("chunk", ["in pieces of 7 where the mask allows"]),
    ],
)
def test_a_way_that_matters_is_seen(batch: Batch, slip: str, ways: list[str]) -> None:
    assert broken(batch, slip) == ways


@pytest.mark.parametrize(("score", "passes"), [(-5e-3, True), (-5e-2, False)])
def test_a_gate_near_its_threshold_may_decide_otherwise(
    batch: Batch, score: float, passes: bool
) -> None:
    whole = Counter().run(batch, 3, np.ones((3, 3), np.int64))
    assert whole.guard_open is not None
    scores = np.full((3, 6, 1), 1e-3, np.float32)  # near it, but nothing is decided there
    scores[:, 3] = score
    opened = whole.guard_open.copy()
    opened[1, 3:] = True
    moved = whole.step_logits + np.array([0, 9, 0])[:, None, None]
    flipped = replace(whole, guard_open=opened, step_logits=moved)
    ways = [("flipped", np.arange(3), flipped)]
    (found,) = same_however_fed(ways, replace(whole, guard_score=scores), BUDGETS)
    assert found.passed == passes


def test_without_a_budget_nothing_is_fed(batch: Batch) -> None:
    whole = Counter().run(batch, 3, np.ones((3, 3), np.int64))
    ways = fed_otherwise(Counter(), batch, whole)
    assert same_however_fed(ways, whole, replace(BUDGETS, cache=None)) == []
    assert next(ways)[0] == "in pieces of 7 where the mask allows"  # none had been run
