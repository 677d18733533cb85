"""CARE's subspaces at the width of 7B models: ours against the public recipe's steps.

    python tools/bench/subspaces.py [--widths 3584 4096] [--skip-public] [--json results.json]

One fit: 400 malicious and 360 benign samples, k = 64, made up but structured: decaying spectrum,
shared directions, outlier dimensions, a mean shift. For each width: our fit (best of five) and what
it holds beside its input; the dense scipy.linalg.eigh of the same problem, with the angle
between the two; the public recipe's steps (covariances, sqrtm, inv, eigh, all d x d; minutes), with
the distance between its projector and that of our compatibility mode. Then every layer and both
modalities of a 32-layer model at the largest width. Threads: set OMP_NUM_THREADS.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy
import scipy.linalg

from guardbake.fit.care_public import RIDGE, PublicSubspace, public_subspace
from guardbake.fit.subspace import discriminative_subspace, largest_angle

MALICIOUS, BENIGN, RANK, LAYERS = 400, 360, 64, 32
RELATIVE_RIDGE = 0.1
Single = npt.NDArray[np.float32]
Matrix = npt.NDArray[np.float64]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--widths", type=int, nargs="+", default=[3584, 4096])
    parser.add_argument("--skip-public", action="store_true", help="leave the d x d recipe out")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    results: dict[str, Any] = {
        "machine": platform.machine(),
        "numpy": np.__version__,
        "scipy": scipy.__version__,
        "samples": [MALICIOUS, BENIGN],
        "rank": RANK,
    }
    for width in arguments.widths:
        results[f"d = {width}"] = _one_fit(width, not arguments.skip_public)
        print(json.dumps({f"d = {width}": results[f"d = {width}"]}, indent=2), flush=True)
    results["whole model"] = _whole_model(max(arguments.widths))
    print(json.dumps({"whole model": results["whole model"]}, indent=2))
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def _samples(seed: int, width: int) -> tuple[Single, Single]:
    """(malicious, benign), float32 as captured."""
    rng = np.random.default_rng(seed)
    scales = np.geomspace(1.0, 0.1, width)
    scales[rng.choice(width, 4, replace=False)] *= 100
    shared = rng.standard_normal((96, width)) * np.geomspace(1.0, 0.1, 96)[:, None]

    def rows(count: int, strength: float) -> Matrix:
        noise = rng.standard_normal((count, width)) * scales
        return noise + strength * rng.standard_normal((count, 96)) @ shared

    malicious = rows(MALICIOUS, 1.0) + 0.3 * rng.standard_normal(width)
    return malicious.astype(np.float32), rows(BENIGN, 0.5).astype(np.float32)


def _one_fit(width: int, with_public: bool) -> dict[str, Any]:
    malicious, benign = _samples(0, width)
    found = discriminative_subspace(malicious, benign, RANK, RELATIVE_RIDGE)
    ours = _best(lambda: discriminative_subspace(malicious, benign, RANK, RELATIVE_RIDGE))
    ours_public = _best(lambda: public_subspace(malicious, benign, RANK))
    started = time.perf_counter()
    dense = _dense(malicious, benign)
    result: dict[str, Any] = {
        "ours, s": ours,
        "ours, compatibility mode, s": ours_public,
        "ours, peak MiB beside the input": _peak(malicious, benign),
        "input, MiB in float64": (MALICIOUS + BENIGN) * width * 8 / 2**20,
        "one d x d matrix, MiB": width**2 * 8 / 2**20,
        "dense eigh, s": time.perf_counter() - started,
        "angle to dense eigh": largest_angle(found.basis, dense),
    }
    if with_public:
        times, columns = _published(malicious, benign)
        total = sum(times.values())
        result |= {
            "public recipe, s": {**times, "total": total},
            "public / ours": total / ours,
            "public / ours, compatibility mode": total / ours_public,
            "distance of the projectors": _distance(
                columns, public_subspace(malicious, benign, RANK)
            ),
        }
    return result


def _best(fit: Callable[[], object]) -> float:
    times = []
    for _ in range(5):
        started = time.perf_counter()
        fit()
        times.append(time.perf_counter() - started)
    return min(times)


def _peak(malicious: Single, benign: Single) -> float:
    """Most MiB that numpy and scipy held at once during our fit; its input was there before."""
    tracemalloc.start()
    discriminative_subspace(malicious, benign, RANK, RELATIVE_RIDGE)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak / 2**20


def _dense(malicious: Single, benign: Single) -> Matrix:
    """[d, k]: the same problem and ridge, solved in d x d."""
    bad, good = (rows.astype(np.float64) for rows in (malicious, benign))
    centre = good.mean(axis=0)
    bad, good = bad - centre, good - centre
    covariance = good.T @ good / len(good)
    covariance += RELATIVE_RIDGE * np.trace(covariance) / len(covariance) * np.eye(len(covariance))
    top = (len(covariance) - RANK, len(covariance) - 1)
    _, vectors = scipy.linalg.eigh(bad.T @ bad / len(bad), covariance, subset_by_index=top)
    return np.linalg.qr(vectors)[0]


def _published(malicious: Single, benign: Single) -> tuple[dict[str, float], Matrix]:
    """Seconds a step, and U [d, k] with unit columns: the public recipe in float64."""
    clock = [time.perf_counter()]
    moment, covariance = (
        np.cov(rows, rowvar=False, bias=True, dtype=np.float64) for rows in (malicious, benign)
    )
    covariance += RIDGE * np.eye(len(covariance))
    clock.append(time.perf_counter())
    root = np.real(scipy.linalg.sqrtm(covariance))
    clock.append(time.perf_counter())
    whitening = np.linalg.inv(root)
    clock.append(time.perf_counter())
    _, vectors = np.linalg.eigh(whitening @ moment @ whitening)
    columns = whitening @ vectors[:, -RANK:]
    columns /= np.linalg.norm(columns, axis=0)
    clock.append(time.perf_counter())
    names = ("covariances", "sqrtm", "inv", "eigh")
    return dict(zip(names, np.diff(clock).tolist(), strict=True)), columns


def _distance(columns: Matrix, ours: PublicSubspace) -> float:
    """|U U^T - Q diag(gains) Q^T|, the largest entry."""
    return float(np.abs(columns @ columns.T - (ours.basis * ours.gains) @ ours.basis.T).max())


def _whole_model(width: int) -> dict[str, Any]:
    """Every layer, both modalities; making the samples up is not timed."""
    seconds = 0.0
    for seed in range(2 * LAYERS):
        malicious, benign = _samples(seed, width)
        started = time.perf_counter()
        discriminative_subspace(malicious, benign, RANK, "ledoit-wolf")
        seconds += time.perf_counter() - started
    return {"d": width, "layers": LAYERS, "subspaces": 2 * LAYERS, "s": seconds}


if __name__ == "__main__":
    main()
