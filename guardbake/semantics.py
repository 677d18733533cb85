"""The law: what a guard computes, in numpy. Every other rendering is compared with this one.

One sensor reads a score, a gate decides, one edit per site changes the FFN output ``y``::

    score    s   = (x - mu_g) . v - tau                   x at the sensor's site
    branch   z_m = (y - mu_m) Q_m                         Q_m [d, k_m] orthonormal
    size     n_m = alpha_m ||z_m||                        == ||y_m' - y||
    weight   w_m = n_m / (n_visual + n_text + eps)        per token
    care     y'  = y - sum_m w_m alpha_m z_m Q_m^T        CARE, arXiv 2603.27240
    project  y'  = y - alpha z Q^T                        one branch
    add      y'  = y + alpha z Q^T                        VLM-Guard, arXiv 2502.10486
    steer    y'  = y + alpha p                            a constant push

``y'`` is taken where the gate is open and ``y``, bit for bit, where it is closed. B is batch, S the
tokens of one call, P the tokens cached before it, d the model width, k a rank.

>>> y = np.arange(6.0).reshape(1, 2, 3)
>>> q = np.eye(3)[:, :1]
>>> project(y, q, np.zeros(3), 1.0)                       # the first coordinate is removed
array([[[0., 1., 2.],
        [0., 4., 5.]]])
>>> bool((gated(y, project(y, q, np.zeros(3), 1.0), np.zeros((1, 2), bool)) == y).all())
True
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
EPS = 1e-8

# guard_state, one int64 a sequence. Larger is later, so latching upwards is a maximum.
# A negative number -n says: undecided, the prompt ends at real token n (attention mask counted).
UNDECIDED, CLOSED, OPEN = 0, 1, 2


def score(x: Array, direction: Array, centre: Array, threshold: float) -> Array:
    """How far x [B, S, d] lies beyond the threshold along the unit direction [d]: [B, S]."""
    return np.asarray((x - centre) @ direction - x.dtype.type(threshold))


def is_open(scores: Array) -> Array:
    """Where a score opens the gate. A score that is not a number opens it: a guard fails closed."""
    return np.asarray(~(scores <= 0))


def gate_by_token(scores: Array, attention_mask: Array) -> Array:
    """Profile `token`: each real token by its own score. Returns open [B, S] bool."""
    real = attention_mask[:, -scores.shape[1] :] == 1
    return np.asarray(is_open(scores) & real)


def gate_by_sequence(scores: Array, attention_mask: Array, state: Array) -> tuple[Array, Array]:
    """Profile `sequence`: the prompt's last real token decides, once, and the verdict is latched.

    scores [B, S] float; attention_mask [B, P + S] of 0 and 1; state [B] int64: -n while the prompt
    ends at real token n, 0 if it ends with this call, 1 closed, 2 open.
    Returns open [B, S] bool and the next state [B]. Earlier prompt tokens are never edited, so the
    prompt's cache does not depend on the gate: whole, chunked, cached and padded runs agree. A
    prompt whose end was fed before without a verdict (a caller's slip) opens: a guard fails closed.
    """
    tokens = scores.shape[1]
    rank = np.cumsum(attention_mask, axis=1)
    real = attention_mask[:, -tokens:] == 1
    missed = (state < UNDECIDED) & (rank[:, -1] - real.sum(axis=1) >= -state)
    state = np.where(missed, OPEN, state)
    end = np.where(state == UNDECIDED, rank[:, -1], -state)[:, None]
    rank = rank[:, -tokens:]
    asked = real & (rank == end) & (state <= UNDECIDED)[:, None]
    verdict = np.where(is_open(scores), OPEN, CLOSED)
    state_out = np.maximum(state, np.where(asked, verdict, state[:, None]).max(axis=1))
    from_end = (rank >= end) | (state == OPEN)[:, None]
    return real & from_end & (state_out == OPEN)[:, None], state_out


@dataclass(frozen=True)
class BranchTerms:
    """One branch of an edit: basis [d, k] orthonormal, centre [d], strength alpha."""

    basis: Array
    centre: Array
    strength: float


def coordinates(y: Array, branch: BranchTerms) -> Array:
    """z = (y - mu) Q, [B, S, k]."""
    return np.asarray((y - branch.centre) @ branch.basis)


def fusion_weights(sizes: Sequence[Array]) -> list[Array]:
    """w_m = n_m / (sum n + eps) from sizes [B, S, 1]; they sum to 1 wherever an edit has a size."""
    total = sum(sizes[1:], start=sizes[0]) + sizes[0].dtype.type(EPS)
    return [size / total for size in sizes]


def care(y: Array, branches: Sequence[BranchTerms]) -> Array:
    """Adaptive fusion of the branches' projections (CARE, section "adaptive fusion")."""
    coords = [coordinates(y, branch) for branch in branches]
    sizes = [
        abs(b.strength) * np.linalg.norm(z, axis=-1, keepdims=True)
        for b, z in zip(branches, coords, strict=True)
    ]
    weights = fusion_weights(sizes)
    out = y
    for branch, z, weight in zip(branches, coords, weights, strict=True):
        out = out - weight * branch.strength * z @ branch.basis.T
    return np.asarray(out.astype(y.dtype))


def project(y: Array, basis: Array, centre: Array, strength: float) -> Array:
    """Remove `strength` of what lies in the subspace: alpha 1 is a projection, above 1 reflects."""
    branch = BranchTerms(basis, centre, strength)
    return np.asarray((y - strength * coordinates(y, branch) @ basis.T).astype(y.dtype))


def add(y: Array, basis: Array, centre: Array, strength: float) -> Array:
    """Amplify what lies in the subspace (VLM-Guard's printed edit)."""
    return project(y, basis, centre, -strength)


def steer(y: Array, push: Array, strength: float) -> Array:
    """Add the constant vector strength * push [d]."""
    return np.asarray((y + strength * push).astype(y.dtype))


def gated(y: Array, edited: Array, open_: Array) -> Array:
    """`edited` where open [B, S] is true, y bit for bit elsewhere (never 0 * x: 0 * inf is NaN)."""
    return np.where(open_[..., None], edited, y)
