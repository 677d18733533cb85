"""ASTRA's steering vector (arXiv 2411.16721), from what image tokens do to a model.

From the paper: pictures that make the model comply have their visual tokens ablated at random (64
times, each token kept with probability 1/2); a Lasso (penalty 0.01, standardised features) fits the
logit of a compliant turn to what was kept; the steering vector is the mean over pictures of
activation with the picture minus activation without the tokens of largest positive coefficient, at
the last prompt token, scaled to unit length; the reference is the mean activation over answers to
harmless pictures. The edit itself is `semantics.astra`.

Where this differs, and why:

- The pictures are typographic, or what benchmarks brought, not PGD images: those are attacks to be
  judged on. A typographic picture carries its request where a perturbation covers all of it.
- Tokens are ablated after the vision tower, where the paper blackens patches of pixels: a token is
  what the decoder sees, whichever family it is from.
- One token in 13 is taken, the paper's 15 of 196 patches; small pictures have few tokens.
- Everything is measured and edited at the FFN output, the boundary that can be baked; the paper
  edits the residual, and of each call the last token alone, which is profile sequence without its
  gate.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from guardbake.activations import rows_at
from guardbake.covariance import Matrix, finite_rows
from guardbake.errors import MalformedError
from guardbake.fit.contrasts import Contrasts
from guardbake.site import Site
from guardbake.spec import Edit

Flags = npt.NDArray[np.bool_]

TIMES, KEPT, SEED = 64, 0.5, 0
PENALTY = 0.01
SHARE = 13  # one token in so many is taken, and never fewer than one
LEAST = 1e-4  # coefficient below which a token carries nothing
SWEEPS, SETTLED = 1000, 1e-10
ROUNDING = 1e-6  # of the rows' length, which are float32: a mean below it is none


def astra_edit(contrasts: Contrasts, layer: int) -> tuple[Edit, dict[str, object]]:
    """`astra` at the FFN output of `layer`, strength 1, and as evidence how many pictures made it
    and the mean cosine of one picture's difference with the vector (1: all alike, 0: noise).

    Raises MalformedError if rows are missing there or not finite, or if they cancel out.
    """
    site = Site(layer, "ffn_output")
    where = f"ASTRA at {site}"
    rows = finite_rows(rows_at(contrasts.ablated, site, where), where, 1)
    moved = rows.mean(axis=0)
    benign = finite_rows(rows_at(contrasts.benign, site, where), where, 2).mean(axis=0)
    length = float(np.linalg.norm(moved))
    lengths = np.linalg.norm(rows, axis=1)
    if not length > ROUNDING * lengths.mean():
        raise MalformedError(
            found="differences that cancel out",
            expected="tokens whose ablation moves the activation",
            where=where,
            remedy="give more harmful pictures, or other layers",
        )
    push, reference = (moved / length).astype(np.float32), benign.astype(np.float32)
    alike = np.divide(rows @ moved / length, lengths, out=np.zeros(len(rows)), where=lengths > 0)
    evidence: dict[str, object] = {
        "pictures": len(rows),
        "agreement": round(float(alike.mean()), 6),
    }
    return Edit(site, "astra", (), push, reference=reference), evidence


def carrying(kept: Flags, scores: npt.ArrayLike) -> Flags:
    """[n] bool, the tokens that a compliant turn's score hangs on most; maybe none.

    kept [N, n] bool, scores [N]. Ties go to the earlier token. Raises MalformedError for scores
    that are not finite.
    """
    targets = finite_rows(np.asarray(scores)[:, None], "scores of ablated pictures", 2)[:, 0]
    weights = lasso(kept.astype(np.float64), targets, PENALTY)
    order = np.argsort(-weights, kind="stable")[: -(-len(weights) // SHARE)]
    chosen = np.zeros(len(weights), bool)
    chosen[order] = weights[order] > LEAST
    return chosen


def lasso(features: Matrix, targets: Matrix, penalty: float) -> Matrix:
    """Coefficients [n] of features [N, n] in their own units, by cyclic coordinate descent.

    Minimises |y - X w|^2 / 2N + penalty |w|_1 over standardised X and centred y (Tibshirani 1996).
    A constant feature gets 0.
    """
    spread = features.std(axis=0)
    varies = spread > 0
    scale = np.where(varies, spread, 1.0)
    x = (features - features.mean(axis=0)) / scale
    left = targets - targets.mean()
    weights = np.zeros(features.shape[1])
    for _ in range(SWEEPS):
        largest = 0.0
        for column in np.flatnonzero(varies):
            before = weights[column]
            along = before + x[:, column] @ left / len(x)
            weights[column] = np.sign(along) * max(abs(along) - penalty, 0.0)
            left -= (weights[column] - before) * x[:, column]
            largest = max(largest, abs(weights[column] - before))
        if largest <= SETTLED * max(1.0, float(np.abs(weights).max())):
            break
    return weights / scale
