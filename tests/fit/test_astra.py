"""ASTRA's attribution finds the tokens that were planted, and its edit takes their work away."""

from __future__ import annotations

import numpy as np
import pytest

from guardbake.activations import Activations, Turns
from guardbake.errors import MalformedError
from guardbake.fit.astra import astra_edit, carrying, lasso
from guardbake.fit.contrasts import Contrasts
from guardbake.semantics import astra
from guardbake.site import Site

FOUR = Site(4, "ffn_output")
WIDTH = 12


def contrasts(ablated: np.ndarray, benign: np.ndarray) -> Contrasts:
    none = Activations([], {}, {})
    return Contrasts(none, Turns({}), Turns({}), ablated={FOUR: ablated}, benign={FOUR: benign})


def planted() -> tuple[np.ndarray, np.ndarray]:
    """Differences along the first axis, and benign rows about 5 on the second."""
    rng = np.random.default_rng(0)
    ablated, benign = (rng.standard_normal((40, WIDTH)).astype(np.float32) for _ in range(2))
    ablated[:, 0] += 6
    benign[:, 1] += 5
    return ablated, benign


# ---- the Lasso


def test_lasso_over_orthogonal_features_is_a_soft_threshold() -> None:
    # a full factorial design: its columns are orthogonal, with mean 1/2 and deviation 1/2
    kept = ((np.arange(16)[:, None] >> np.arange(4)) & 1).astype(float)
    targets = 3 + kept @ np.array([2.0, -1.0, 0.1, 0.0])
    found = lasso(kept, targets, 0.2)
    expected = [(1.0 - 0.2) / 0.5, -(0.5 - 0.2) / 0.5, 0.0, 0.0]
    np.testing.assert_allclose(found, expected, atol=1e-9)


def test_lasso_meets_its_optimality_conditions() -> None:
    rng = np.random.default_rng(3)
    kept = (rng.random((64, 49)) < 0.5).astype(float)
    kept[:, 7] = 1.0
    targets = kept @ rng.standard_normal(49) + rng.standard_normal(64)
    spread = np.where(kept.std(axis=0) > 0, kept.std(axis=0), 1)
    x, weights = (kept - kept.mean(axis=0)) / spread, lasso(kept, targets, 0.05) * spread
    slope = x.T @ (targets - targets.mean() - x @ weights) / 64
    assert weights[7] == 0
    used = weights != 0
    assert 0 < used.sum() < 49
    np.testing.assert_allclose(slope[used], 0.05 * np.sign(weights[used]), atol=1e-7)
    assert (np.abs(slope[~used]) <= 0.05 + 1e-7).all()


# ---- which tokens


def test_the_planted_tokens_are_chosen_and_no_others() -> None:
    rng = np.random.default_rng(1)
    kept = rng.random((64, 49)) < 0.5
    scores = 2.0 * kept[:, 5] + 1.5 * kept[:, 40] - 3.0 * kept[:, 9] - 4
    chosen = carrying(kept, scores + 0.05 * rng.standard_normal(64))
    assert set(np.flatnonzero(chosen)) >= {5, 40}
    assert chosen.sum() <= 4  # of 49 tokens, one in 13
    assert not chosen[9]
    few = carrying(kept[:, :8], 1.0 * kept[:, 3])
    assert list(np.flatnonzero(few)) == [3]


def test_a_score_that_hangs_on_no_token_chooses_none() -> None:
    kept = np.random.default_rng(1).random((64, 16)) < 0.5
    assert not carrying(kept, np.full(64, -2.5)).any()
    assert not carrying(kept, -1.0 * kept.sum(axis=1)).any()


def test_scores_that_are_not_finite_are_refused() -> None:
    with pytest.raises(MalformedError, match="finite rows"):
        carrying(np.ones((4, 3), bool), [0.0, 1.0, np.nan, 2.0])


# ---- the edit


def test_the_edit_takes_away_what_the_tokens_did_and_spares_the_benign() -> None:
    ablated, benign = planted()
    edit, evidence = astra_edit(contrasts(ablated, benign), 4)
    assert evidence["pictures"] == 40
    cosines = ablated @ ablated.mean(axis=0) / np.linalg.norm(ablated.mean(axis=0))
    assert evidence["agreement"] == pytest.approx(
        (cosines / np.linalg.norm(ablated, axis=1)).mean(), abs=1e-5
    )
    assert (edit.site, edit.kind, edit.strength) == (FOUR, "astra", 1.0)
    assert edit.push is not None
    assert edit.reference is not None
    assert edit.push[0] > 0.99
    np.testing.assert_allclose(edit.reference, benign.mean(axis=0), atol=1e-6)
    moved = np.float32(edit.reference + 6 * edit.push)[None]
    away = np.float32(edit.reference - 6 * edit.push)[None]
    after = astra(moved, edit.push, edit.reference, 0.5)
    assert float((after @ edit.push)[0]) < float((moved @ edit.push)[0]) - 1
    np.testing.assert_array_equal(astra(away, edit.push, edit.reference, 0.5), away)


def test_the_same_rows_give_the_same_edit() -> None:
    one, other = (astra_edit(contrasts(*planted()), 4)[0] for _ in range(2))
    assert one.push is not None
    assert other.push is not None
    assert one.push.tobytes() == other.push.tobytes()


def test_what_cannot_be_fitted_is_named() -> None:
    ablated, benign = planted()
    with pytest.raises(MalformedError, match=r"at layers\.5\.ffn_output") as missing:
        astra_edit(contrasts(ablated, benign), 5)
    assert missing.value.exit_code == 9
    both = np.concatenate([ablated, -ablated])
    with pytest.raises(MalformedError, match="cancel out"):
        astra_edit(contrasts(both - both.mean(axis=0), benign), 4)
    with pytest.raises(MalformedError, match="finite"):
        astra_edit(contrasts(np.full_like(ablated, np.nan), benign), 4)
