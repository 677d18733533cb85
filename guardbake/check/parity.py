"""Parity of two runs of the same feeds: how far apart, where, and what is allowed.

No tolerance is a default: every budget is declared and names its source. A value that is not finite
fails whatever the budget; a comparison of nothing is a failure, not a pass.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from guardbake.plugins import Trace
from guardbake.semantics import OPEN, own_state

Array = npt.NDArray[Any]
TOLD_APART = (
    1e3  # guarded and unguarded must differ by this many logit budgets, or the test is blind
)


@dataclass(frozen=True)
class Budget:
    """limit: the largest allowed value; source: why this one."""

    limit: float
    source: str


@dataclass(frozen=True)
class Budgets:
    """score, ffn_output, logits: largest absolute difference. margin_band: gate decisions may
    differ only where the reference's |score| is within it."""

    score: Budget
    ffn_output: Budget
    logits: Budget
    margin_band: Budget


@dataclass(frozen=True)
class Comparison:
    """One quantity. worst: the largest difference, which is also the tolerance that would pass.

    limit None: a count or a share, passed iff `worst` is 0. compared: numbers looked at.
    """

    quantity: str
    worst: float
    limit: float | None
    source: str
    compared: int
    where: str

    @property
    def passed(self) -> bool:
        bound = 0.0 if self.limit is None else self.limit
        return self.compared > 0 and bool(np.isfinite(self.worst)) and self.worst <= bound


@dataclass(frozen=True)
class Pair:
    """One batch run three times on the same feeds.

    reference: PyTorch, greedy. forced: the candidate fed the reference's tokens. free: the
    candidate greedy, or None if not run. undefended: PyTorch without the guard, fed the
    reference's tokens, or None if not run.
    """

    name: str
    reference: Trace
    forced: Trace
    free: Trace | None
    undefended: Trace | None


@dataclass(frozen=True)
class ParityReport:
    """All comparisons; flips_in_band: gate decisions that differed where the band allows it.

    decisions: gates times rows, less the gates of a row behind its first flip, which saw another
    stream. margins: |score| of the reference at deciding tokens: smallest, 5 % and median.
    """

    comparisons: tuple[Comparison, ...]
    flips_in_band: int
    decisions: int
    margins: Mapping[str, float]

    @property
    def passed(self) -> bool:
        return bool(self.comparisons) and all(c.passed for c in self.comparisons)

    def to_json(self) -> dict[str, Any]:
        rows = [{**asdict(c), "passed": c.passed} for c in self.comparisons]
        for row in rows:  # JSON has no infinities
            row["worst"] = row["worst"] if np.isfinite(row["worst"]) else str(row["worst"])
        return {
            "passed": self.passed,
            "comparisons": rows,
            "flips_in_band": self.flips_in_band,
            "decisions": self.decisions,
            "margins": dict(self.margins),
        }


def compare(pairs: Sequence[Pair], budgets: Budgets, gated: bool) -> ParityReport:
    """Every quantity over every pair. gated: the guard has sensors, so there are decisions."""
    flips = [_flips(pair, budgets.margin_band.limit) for pair in pairs] if gated else []
    same = [f.same for f in flips] if gated else [_all_rows(p) for p in pairs]
    comparisons = [
        _largest("logits, prefill", budgets.logits, _prefill_logits(pairs, same)),
        _largest("logits, decode", budgets.logits, _decode_logits(pairs, same)),
        *_tap_comparisons(pairs, same, budgets),
        _tokens(pairs, same),
    ]
    if gated:
        comparisons += [
            _largest("guard score", budgets.score, _scores(pairs, flips)),
            _count("gate decisions outside the band", flips, sum(f.outside for f in flips)),
            _count("guard_open unlike guard_state", flips, sum(f.incoherent for f in flips)),
        ]
    if any(pair.undefended is not None for pair in pairs):
        comparisons.append(_told_apart(pairs, budgets))
    return ParityReport(
        tuple(comparisons),
        sum(f.inside for f in flips),
        sum(f.decisions for f in flips),
        _margins(flips),
    )


@dataclass(frozen=True, eq=False)
class _Flips:
    same: Array  # [B] bool: rows whose gates all decided alike
    judged: Array  # [B, G] bool: gates up to and with a row's first flip: they saw the same stream
    inside: int
    outside: int
    incoherent: int
    decisions: int
    margins: Array


Difference = tuple[str, Array, Array]


def _token_mask(trace: Trace) -> Array:
    """[B, T + n - 1] bool: real tokens fed, up to each row's end."""
    new = np.arange(trace.tokens.shape[1] - 1)[None] < trace.lengths[:, None] - 1
    return np.concatenate([trace.valid, new], axis=1)


def _all_rows(pair: Pair) -> Array:
    return np.ones(len(pair.reference.tokens), bool)


def _flips(pair: Pair, band: float) -> _Flips:
    """Compare each gate's decisions token by token; a row counts once, at its first flip."""
    ref, got = pair.reference, pair.forced
    assert ref.guard_open is not None
    assert ref.guard_score is not None
    seen = _token_mask(ref)
    deciding = _deciding(ref, seen)[..., None]
    margin = np.where(deciding, np.abs(ref.guard_score), np.inf).min(axis=1)
    if got.guard_open is None or got.guard_open.shape != ref.guard_open.shape:
        none = np.zeros(len(margin), bool)
        every = np.ones(margin.shape, bool)
        return _Flips(none, every, 0, every.size, every.size, every.size, margin)
    differs = ((ref.guard_open != got.guard_open) & seen[..., None]).any(axis=1)
    judged = np.cumsum(differs, axis=1) - differs == 0
    flipped = differs & judged
    inside = flipped & (margin <= band)
    return _Flips(
        ~differs.any(axis=1),
        judged,
        int(inside.sum()),
        int((flipped & ~inside).sum()),
        0 if ref.guard_state is None else _incoherent(got, seen),
        int(judged.sum()),
        margin,
    )


def _incoherent(trace: Trace, seen: Array) -> int:
    """Gates whose own answers and whose bit of the latched state do not say the same."""
    assert trace.guard_open is not None
    opened = (trace.guard_open & seen[..., None]).any(axis=1)
    if trace.guard_state is None:
        return int(opened.size)
    gates = range(opened.shape[1])
    said = [own_state(trace.guard_state, gate) == OPEN for gate in gates]
    return int((opened != np.stack(said, axis=1)).sum())


def _deciding(trace: Trace, seen: Array) -> Array:
    """[B, T + n - 1] bool: tokens whose score decides: the last of the prompt if latched."""
    if trace.guard_state is None:
        return seen
    deciding = np.zeros_like(seen)
    deciding[:, trace.valid.shape[1] - 1] = True
    return deciding


def _prefill_logits(pairs: Sequence[Pair], same: Sequence[Array]) -> Iterable[Difference]:
    for pair, rows in zip(pairs, same, strict=True):
        mask = pair.reference.valid[:, -pair.reference.prefill_logits.shape[1] :] & rows[:, None]
        yield pair.name, mask, _gap(pair.reference.prefill_logits, pair.forced.prefill_logits)


def _decode_logits(pairs: Sequence[Pair], same: Sequence[Array]) -> Iterable[Difference]:
    for pair, rows in zip(pairs, same, strict=True):
        steps = np.arange(pair.reference.tokens.shape[1])[None]
        mask = (steps < pair.reference.lengths[:, None]) & rows[:, None]
        yield pair.name, mask, _gap(pair.reference.step_logits, pair.forced.step_logits)


def _scores(pairs: Sequence[Pair], flips: Sequence[_Flips]) -> Iterable[Difference]:
    """Gate by gate, where both saw the same stream."""
    for pair, flip in zip(pairs, flips, strict=True):
        ref, got = pair.reference.guard_score, pair.forced.guard_score
        assert ref is not None
        gap = np.full(ref.shape, np.inf) if got is None else _gap(ref[..., None], got[..., None])
        for gate, rows in enumerate(flip.judged.T):
            mask = _token_mask(pair.reference) & rows[:, None]
            yield f"{pair.name}, gate {gate}", mask, gap[..., gate]


def _tap_comparisons(
    pairs: Sequence[Pair], same: Sequence[Array], budgets: Budgets
) -> list[Comparison]:
    """One comparison a guarded FFN output that the reference recorded and the candidate tapped."""
    tapped = all(pair.forced.taps for pair in pairs)
    out = []
    for name in sorted(pairs[0].reference.taps) if tapped else []:
        gaps = [
            (
                pair.name,
                _token_mask(pair.reference) & rows[:, None],
                _gap(pair.reference.taps[name], pair.forced.taps[name]),
            )
            for pair, rows in zip(pairs, same, strict=True)
        ]
        out.append(_largest(f"FFN output, {name}", budgets.ffn_output, gaps))
    return out


def _gap(a: Array, b: Array) -> Array:
    """Largest |a - b| over the last axis; a value that is not finite is infinitely far."""
    if a.shape != b.shape:
        return np.full(a.shape[:-1], np.inf)
    wide = np.abs(a.astype(np.float64) - b.astype(np.float64))
    return np.asarray(np.where(np.isfinite(wide), wide, np.inf).max(axis=-1))


def _largest(quantity: str, budget: Budget, differences: Iterable[Difference]) -> Comparison:
    worst, where, compared = 0.0, "nowhere", 0
    for name, mask, gap in differences:
        compared += int(mask.sum())
        masked = np.where(mask, gap, 0.0)
        place = np.unravel_index(masked.argmax(), masked.shape)
        if masked[place] >= worst and mask.any():
            worst, where = float(masked[place]), f"{name}, row {place[0]}, token {place[1]}"
    return Comparison(quantity, worst, budget.limit, budget.source, compared, where)


def _tokens(pairs: Sequence[Pair], same: Sequence[Array]) -> Comparison:
    """Greedy tokens of the free run that differ from the reference's, up to each row's end."""
    wrong, compared, where = 0, 0, "nowhere"
    for pair, rows in zip(pairs, same, strict=True):
        if pair.free is None:
            continue
        ref, got = pair.reference, pair.free
        steps = ref.tokens.shape[1]
        padded = np.full(ref.tokens.shape, -1)
        padded[:, : got.tokens.shape[1]] = got.tokens[:, :steps]
        mask = (np.arange(steps)[None] < ref.lengths[:, None]) & rows[:, None]
        differs = (ref.tokens != padded) & mask
        wrong, compared = wrong + int(differs.sum()), compared + int(mask.sum())
        if differs.any() and where == "nowhere":
            row, step = np.argwhere(differs)[0]
            where = f"{pair.name}, row {row}, step {step}"
    return Comparison("greedy tokens that differ", wrong, None, "greedy is exact", compared, where)


def _count(quantity: str, flips: Sequence[_Flips], number: int) -> Comparison:
    compared = sum(f.decisions for f in flips)
    return Comparison(quantity, number, None, "decisions are discrete", compared, "see margins")


def _told_apart(pairs: Sequence[Pair], budgets: Budgets) -> Comparison:
    """How blind the test is: guarded and unguarded logits must be TOLD_APART budgets apart.

    Stated as the shortfall, so that 0 passes.
    """
    gaps = [
        _gap(pair.reference.step_logits, pair.undefended.step_logits).max()
        for pair in pairs
        if pair.undefended is not None
    ]
    reach = float(max(gaps))
    shortfall = max(0.0, TOLD_APART * budgets.logits.limit - reach)
    source = (
        f"guarded and unguarded logits differ by {reach:.3g}; {TOLD_APART:g} budgets are wanted"
    )
    return Comparison("blindness to the guard", shortfall, None, source, len(gaps), "all batches")


def _margins(flips: Sequence[_Flips]) -> dict[str, float]:
    if not flips:
        return {}
    margins = np.concatenate([f.margins.ravel() for f in flips])
    names = {"smallest": 0.0, "5 %": 0.05, "median": 0.5}
    return {name: float(np.quantile(margins, share)) for name, share in names.items()}
