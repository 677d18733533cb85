"""The law: what a guard computes, in numpy. Every other rendering is compared with this one.

Sensors read scores, a gate each decides, one edit per site changes the FFN output ``y``::

    features f   = sum_r (x_r - mu_r) D_r                 x_r at the sensor's sites, D_r [d, C]
    score    s   = f_last - tau                           C = 1: one threshold for every request
             s   = f_last - tau_text                      C = 2: no image token up to here, else
                   f_last + max(-tau_visual, mean(f_pooled) - tau_pooled)     mean over the image
                                                          tokens up to here: they can only accuse
    branch   z_m = (y - mu_m) Q_m                         Q_m [d, k_m] orthonormal
    part     p_m = alpha_m (gains_m * z_m) Q_m^T          gains_m [k_m], all ones unless given
    size     n_m = ||p_m||                                == alpha_m ||gains_m * z_m||
    weight   w_m = n_m / (n_visual + n_text + eps)        per token
    care     y'  = y - sum_m w_m p_m                      adaptive: CARE, arXiv 2603.27240
             y'  = y - sum_m p_m                          parallel
             y'  = y1 - p_text(y1), y1 = y - p_visual(y)  sequential
    project  y'  = y - p                                  one branch
    add      y'  = y + p                                  VLM-Guard, arXiv 2502.10486
    replace  y'  = y + (alpha t - z) Q^T                  VLM-Guard, with its text-only pass
    steer    y'  = y + alpha v                            a constant push
    astra    y'  = y - alpha c ||y|| v                    ASTRA, arXiv 2411.16721; v unit length
             c   = clip((y - r) . v / (||y - r|| + eps), 0, 1)

A sensor reads a site before the edit there, but after the edits of earlier sites: the score of a
later gate sees the stream as earlier gates left it. With a sensor a layer that is VLM-Guard, where
each layer's own hidden state opens it.
``t`` [B, k] is ``z`` of the last token when the same prompt goes through the unguarded model
without its image tokens. ``y'`` is taken where the gate is open and ``y``, bit for bit, where it is
closed. B is batch, S the tokens of one call, P the tokens cached before it, d the model width, k a
rank.

>>> from types import SimpleNamespace
>>> y = np.arange(6.0).reshape(1, 2, 3)
>>> q = np.eye(3)[:, :1]
>>> first = SimpleNamespace(basis=q, centre=np.zeros(3), strength=1.0, gains=None)
>>> project(y, first)                                     # the first coordinate is removed
array([[[0., 1., 2.],
        [0., 4., 5.]]])
>>> bool((gated(y, project(y, first), np.zeros((1, 2), bool)) == y).all())
True
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Fusion = Literal["adaptive", "parallel", "sequential"]
EPS = 1e-8

# guard_state, one int64 a sequence. A negative number -n says: undecided, the prompt ends at real
# token n (attention mask counted). Decided it is CLOSED + sum of 2**g over the open gates g: of one
# gate 1 or 2. Larger is later, so latching one gate's own state upwards is a maximum.
UNDECIDED, CLOSED, OPEN = 0, 1, 2


# Columns of a sensor that pools, and of its memory, guard_memory [B, 3] float32: sum of f_pooled
# over the image tokens so far, their number, and the real tokens so far.
LAST, POOLED = 0, 1
SUM, IMAGES, TOKENS = 0, 1, 2


class ReadingTerms(Protocol):
    """What a sensor takes from one site: directions [d, C], centre [d]."""

    @property
    def directions(self) -> Array: ...
    @property
    def centre(self) -> Array: ...


def features(xs: Sequence[Array], readings: Sequence[ReadingTerms]) -> Array:
    """f [B, S, C] from one x [B, S, d] a reading."""
    parts = [(x - r.centre) @ r.directions for x, r in zip(xs, readings, strict=True)]
    return np.asarray(sum(parts[1:], start=parts[0]))


def score(f: Array, thresholds: Sequence[float]) -> Array:
    """How far features f [B, S, 1] lie beyond the one threshold: [B, S]."""
    return np.asarray(f[..., LAST] - f.dtype.type(thresholds[0]))


def pooled_score(
    f: Array, thresholds: Sequence[float], attention_mask: Array, image_mask: Array, memory: Array
) -> tuple[Array, Array]:
    """Scores [B, S] from features f [B, S, 2], and the next memory.

    thresholds: for requests without an image, with one, and with one whose image tokens count.
    What image tokens say can raise a score and never lower it: a picture of a kind that nothing was
    fitted on, or one made to that end, does not silence the last token.
    attention_mask [B, P + S]; image_mask [B, S] bool, the call's image tokens; memory [B, 3] is
    zeros before the first call. A token's score depends on it and on earlier tokens alone, so
    whole, chunked, cached and padded runs agree.
    """
    text, visual, pooled = (f.dtype.type(threshold) for threshold in thresholds)
    real = attention_mask[:, -f.shape[1] :] == 1
    image = image_mask & real
    total = memory[:, SUM, None] + np.cumsum(np.where(image, f[..., POOLED], 0), axis=1)
    images = memory[:, IMAGES, None] + np.cumsum(image, axis=1)
    seen = f[..., LAST] + np.maximum(-visual, total / np.maximum(images, 1) - pooled)
    scores = np.where(images > 0, seen, f[..., LAST] - text)
    tokens = memory[:, TOKENS] + real.sum(axis=1)
    after = np.stack([total[:, -1], images[:, -1], tokens], axis=1)
    return scores.astype(f.dtype), after.astype(memory.dtype)


def forgotten(attention_mask: Array, tokens: int, memory: Array) -> Array:
    """[B] bool: the memory [B, 3] has not seen the tokens cached before a call of `tokens`."""
    return np.asarray(attention_mask[:, :-tokens].sum(axis=1) != memory[:, TOKENS])


def is_open(scores: Array) -> Array:
    """Where a score opens the gate. A score that is not a number opens it: a guard fails closed."""
    return np.asarray(~(scores <= 0))


def gate_by_token(scores: Array, attention_mask: Array) -> Array:
    """Profile `token`: each real token by its own score. Returns open [B, S] bool."""
    real = attention_mask[:, -scores.shape[1] :] == 1
    return np.asarray(is_open(scores) & real)


def gate_by_sequence(
    scores: Array, attention_mask: Array, state: Array, memory: Array | None = None
) -> tuple[Array, Array]:
    """Profile `sequence`: the prompt's last real token decides, once, and the verdict is latched.

    One gate: scores [B, S] float; attention_mask [B, P + S] of 0 and 1; state [B] int64, the gate's
    own (`own_state`): -n while the prompt ends at real token n, 0 if it ends with this call, 1
    closed, 2 open; memory [B, 3] as it came into the call, where the first sensor has one.
    Returns open [B, S] bool and the next state [B]. Earlier prompt tokens are never edited, so the
    prompt's cache does not depend on the gate: whole, chunked, cached and padded runs agree. A
    caller's slip opens every gate, for a guard fails closed: a prompt whose end was fed before
    without a verdict, or an undecided one whose memory has not seen what was fed before.
    """
    tokens = scores.shape[1]
    rank = np.cumsum(attention_mask, axis=1)
    real = attention_mask[:, -tokens:] == 1
    missed = (state < UNDECIDED) & (rank[:, -1] - real.sum(axis=1) >= -state)
    if memory is not None:
        missed |= (state <= UNDECIDED) & forgotten(attention_mask, tokens, memory)
    state = np.where(missed, OPEN, state)
    end = np.where(state == UNDECIDED, rank[:, -1], -state)[:, None]
    rank = rank[:, -tokens:]
    asked = real & (rank == end) & (state <= UNDECIDED)[:, None]
    verdict = np.where(is_open(scores), OPEN, CLOSED)
    state_out = np.maximum(state, np.where(asked, verdict, state[:, None]).max(axis=1))
    from_end = (rank >= end) | (state == OPEN)[:, None]
    return real & from_end & (state_out == OPEN)[:, None], state_out


def own_state(state: Array, gate: int) -> Array:
    """What guard_state [B] says of one gate: as it is while undecided, then CLOSED or OPEN."""
    decided = np.maximum(state, CLOSED) - CLOSED
    return np.where(state <= UNDECIDED, state, CLOSED + decided // 2**gate % 2)


def joint_state(states: Sequence[Array]) -> Array:
    """guard_state [B] from every gate's own state [B]; the same call decides them all."""
    opened = sum((own - CLOSED) * 2**gate for gate, own in enumerate(states))
    return np.where(states[0] <= UNDECIDED, states[0], CLOSED + opened)


class BranchTerms(Protocol):
    """One branch of an edit: basis [d, k] orthonormal, centre [d], strength alpha, gains [k]."""

    @property
    def basis(self) -> Array: ...
    @property
    def centre(self) -> Array: ...
    @property
    def strength(self) -> float: ...
    @property
    def gains(self) -> Array | None: ...


class EditTerms(Protocol):
    """One edit, as `spec.Edit` has it."""

    @property
    def kind(self) -> str: ...
    @property
    def branches(self) -> Sequence[BranchTerms]: ...
    @property
    def fusion(self) -> Fusion: ...
    @property
    def push(self) -> Array | None: ...
    @property
    def reference(self) -> Array | None: ...
    @property
    def strength(self) -> float: ...


def edited(y: Array, edit: EditTerms, text: Array | None = None) -> Array:
    """The edit with the gate open: y' [B, S, d] in y's dtype. text [B, k]: t, for replace only."""
    if edit.push is None:
        if edit.kind == "care":
            return care(y, edit.branches, edit.fusion)
        if edit.kind == "replace":
            assert text is not None, "replace needs the text-only pass"
            return replace(y, edit.branches[0], text)
        return {"project": project, "add": add}[edit.kind](y, edit.branches[0])
    if edit.reference is None:
        return steer(y, edit.push, edit.strength)
    return astra(y, edit.push, edit.reference, edit.strength)


def coordinates(y: Array, branch: BranchTerms) -> Array:
    """z = (y - mu) Q, [B, S, k]."""
    return np.asarray((y - branch.centre) @ branch.basis)


def scaled(y: Array, branch: BranchTerms) -> Array:
    """alpha (gains * z), [B, S, k]: as long as the part p itself, because Q is orthonormal."""
    z = coordinates(y, branch)
    return np.asarray(branch.strength * (z if branch.gains is None else branch.gains * z))


def fusion_weights(sizes: Sequence[Array]) -> list[Array]:
    """w_m = n_m / (sum n + eps) from sizes [B, S, 1]; they sum to 1 wherever an edit has a size."""
    total = sum(sizes[1:], start=sizes[0]) + sizes[0].dtype.type(EPS)
    return [size / total for size in sizes]


def care(y: Array, branches: Sequence[BranchTerms], fusion: Fusion) -> Array:
    """The branches' parts removed, weighted by their sizes, together, or one after the other.

    Only adaptive is CARE's own; parallel and sequential are affine in y.
    """
    if fusion == "sequential":
        for branch in branches:
            y = project(y, branch)
        return y
    parts = [scaled(y, branch) for branch in branches]
    if fusion == "adaptive":
        sizes = [np.linalg.norm(part, axis=-1, keepdims=True) for part in parts]
        parts = [w * part for w, part in zip(fusion_weights(sizes), parts, strict=True)]
    out = y
    for branch, part in zip(branches, parts, strict=True):
        out = out - part @ branch.basis.T
    return np.asarray(out.astype(y.dtype))


def project(y: Array, branch: BranchTerms) -> Array:
    """Remove `strength` of what lies in the subspace: alpha 1 is a projection, above 1 reflects."""
    return np.asarray((y - scaled(y, branch) @ branch.basis.T).astype(y.dtype))


def add(y: Array, branch: BranchTerms) -> Array:
    """Amplify what lies in the subspace (VLM-Guard's printed edit)."""
    return np.asarray((y + scaled(y, branch) @ branch.basis.T).astype(y.dtype))


def replace(y: Array, branch: BranchTerms, text: Array) -> Array:
    """Put `strength` times the coordinates text [B, k] in the place of y's own.

    The reading of VLM-Guard in which the text-only answer's safety is handed on, not amplified.
    """
    wanted = branch.strength * text[:, None, :]
    return np.asarray((y + (wanted - coordinates(y, branch)) @ branch.basis.T).astype(y.dtype))


def steer(y: Array, push: Array, strength: float) -> Array:
    """Add the constant vector strength * push [d]."""
    return np.asarray((y + strength * push).astype(y.dtype))


def astra(y: Array, push: Array, reference: Array, strength: float) -> Array:
    """Remove along the unit vector push [d] as far as y points that way, seen from reference [d].

    The paper's reference is the mean activation over calibration prompts.
    """
    away = y - reference
    length = np.linalg.norm(away, axis=-1, keepdims=True) + y.dtype.type(EPS)
    cosine = np.clip((away @ push)[..., None] / length, 0, 1)
    size = np.linalg.norm(y, axis=-1, keepdims=True)
    return np.asarray((y - strength * cosine * size * push).astype(y.dtype))


def gated(y: Array, edited: Array, open_: Array) -> Array:
    """`edited` where open [B, S] is true, y bit for bit elsewhere (never 0 * x: 0 * inf is NaN)."""
    return np.where(open_[..., None], edited, y)
