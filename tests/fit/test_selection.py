"""Ridge, rank and trust are decided by rows that were left out, and planted answers are found."""

from __future__ import annotations

import json

import numpy as np
import numpy.typing as npt
import pytest

from guardbake.errors import MalformedError
from guardbake.fit.selection import (
    RIDGES,
    bootstrap,
    choose_rank,
    choose_ridge,
    held_out,
    largest_rank,
    trust,
    winsorised,
)
from guardbake.fit.subspace import discriminative_subspace

Matrix = npt.NDArray[np.float64]


def planted(
    count: int, width: int, dimensions: int, strength: float = 8.0
) -> tuple[Matrix, Matrix]:
    """Malicious rows vary `strength` times as much along the first `dimensions` axes."""
    rng = np.random.default_rng(0)
    bad, good = rng.standard_normal((2, count, width))
    bad[:, :dimensions] *= strength
    return bad, good


def test_shares_are_those_of_rows_left_out() -> None:
    """By hand, fold by fold, with the projector written out."""
    bad, good = planted(23, 40, 2)
    found = held_out(bad, good, 3, 0.1)
    shares: list[list[Matrix]] = [[], []]
    for fold in range(5):
        out = np.arange(23) % 5 == fold
        fit = discriminative_subspace(bad[~out], good[~out], 3, 0.1)
        for seen, rows in zip(shares, (bad[out], good[out]), strict=True):
            for row in rows - fit.centre:
                parts = [row @ fit.basis[:, :k] @ fit.basis[:, :k].T for k in (1, 2, 3)]
                seen.append(np.array([part @ part for part in parts]) / (row @ row))
    assert np.abs(found.energy - np.mean(shares[0], axis=0)).max() < 1e-12
    assert np.abs(found.distortion - np.mean(shares[1], axis=0)).max() < 1e-12


def test_noise_holds_as_much_benign_as_malicious() -> None:
    """On the fitted rows the ratio is large all the same: that is why it is not used."""
    bad, good = planted(60, 200, 0)
    shares = held_out(bad, good, 8, 1e-2)
    assert shares.energy[-1] == pytest.approx(shares.distortion[-1], rel=0.3)
    assert discriminative_subspace(bad, good, 8, 1e-2).spectrum[-1] > 20


@pytest.mark.parametrize("dimensions", [1, 3, 6])
def test_the_planted_rank_is_chosen(dimensions: int) -> None:
    bad, good = planted(200, 60, dimensions)
    assert choose_rank(bad, good, 12, 0.1) == dimensions


def test_nothing_to_find_is_an_error_and_no_rank() -> None:
    rows, _ = planted(100, 60, 0)
    with pytest.raises(MalformedError, match="holds more of malicious rows") as caught:
        choose_rank(rows, rows, 4, 0.1)
    assert caught.value.exit_code == 9


def test_the_ridge_is_the_one_of_least_benign_distortion() -> None:
    rng = np.random.default_rng(1)
    scales = np.geomspace(5, 0.2, 150)
    bad, good = rng.standard_normal((2, 50, 150)) * scales
    bad[:, 80] *= 10
    chosen = choose_ridge(bad, good, 2)
    measured = [held_out(bad, good, 2, ridge).distortion[-1] for ridge in RIDGES]
    assert chosen == RIDGES[int(np.argmin(measured))]
    assert max(measured) > 1.5 * min(measured)  # there was something to choose


def test_stability_tells_signal_from_noise() -> None:
    signal, noise = (bootstrap(*planted(400, 30, n), 3, 0.1) for n in (3, 0))
    assert signal.overlap > 0.9
    assert signal.angle < 0.5
    assert noise.overlap < 0.6
    assert noise.angle > 1.0
    assert bootstrap(*planted(400, 30, 3), 3, 0.1) == signal  # the same seed, the same draws


def test_winsorising_cuts_each_dimension_at_the_quantiles_of_all_rows() -> None:
    bad, good = planted(100, 5, 0)
    bad[7, 2] = 1e6
    cut_bad, cut_good = winsorised(bad, good, 0.05)
    low, high = np.quantile(np.concatenate([bad, good])[:, 2], [0.05, 0.95])
    assert cut_bad[7, 2] == high < 3
    assert cut_good[:, 2].min() >= low
    inside = (good[:, 2] > low) & (good[:, 2] < high)
    assert (cut_good[inside, 2] == good[inside, 2]).all()
    assert inside.mean() == pytest.approx(0.9, abs=0.05)


def test_too_few_rows_for_the_folds() -> None:
    bad, good = planted(4, 10, 0)
    with pytest.raises(MalformedError, match="at least 5"):
        held_out(bad, good, 1, 0.1)


def test_trust_is_both_or_an_honest_nothing() -> None:
    bad, good = planted(60, 30, 3)
    found = trust(bad, good, 3, 0.1)
    assert found["held_out"]["energy"] == held_out(bad, good, 3, 0.1).energy[-1]  # type: ignore[index]
    assert found["bootstrap"]["overlap"] == bootstrap(bad, good, 3, 0.1).overlap  # type: ignore[index]
    assert json.loads(json.dumps(found)) == found
    assert trust(bad[:8], good, 3, 0.1) == {"held_out": None, "bootstrap": None}


def test_the_largest_rank_leaves_the_folds_room() -> None:
    assert largest_rank(400, 4096) == 64
    assert largest_rank(100, 4096) == 40
    assert largest_rank(100, 12) == 6
    assert largest_rank(2, 4096) == 1
