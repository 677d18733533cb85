"""Parity of two runs of the same feeds: how far apart, where, and what is allowed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from guardbake.check.comparison import (
    Budgets,
    Comparison,
    Difference,
    Runs,
    gap,
    largest,
    step_mask,
    token_mask,
)
from guardbake.check.decisions import Flips, decided_alike, flips, histogram, margins
from guardbake.check.distribution import against_noise, divergence, likeliest
from guardbake.check.likeness import alike
from guardbake.plugins import EDITED, Trace

Array = npt.NDArray[Any]


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
    stream. margins: |score| of the reference at deciding tokens: smallest, 5 % and median;
    histogram: how many of them lie between which powers of ten.
    """

    comparisons: tuple[Comparison, ...]
    flips_in_band: int
    decisions: int
    margins: Mapping[str, float]
    histogram: Sequence[Mapping[str, float | int | None]] = field(default_factory=tuple)

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
            "histogram": [dict(each) for each in self.histogram],
        }


def compare(
    pairs: Sequence[Pair],
    budgets: Budgets,
    gated: bool,
    noise: float | None = None,
    more: Sequence[Comparison] = (),
) -> ParityReport:
    """Every quantity over every pair that has a budget.

    gated: the guard has sensors, so there are decisions. noise: the reference's own distance from
    itself in the candidate's precision, see `distribution.against_noise`; None: not measured, which
    fails where a budget is declared for it. more: what was compared besides.
    """
    band = budgets.margin_band.limit
    found = [flips(pair.reference, pair.forced, band) for pair in pairs] if gated else []
    same = [f.same for f in found] if gated else [_all_rows(p) for p in pairs]
    runs: list[Runs] = [
        (pair.name, pair.reference, pair.forced, rows)
        for pair, rows in zip(pairs, same, strict=True)
    ]
    comparisons = [
        largest("logits", "logits, prefill", budgets.logits, _prefill_logits(runs)),
        largest("logits", "logits, decode", budgets.logits, _decode_logits(runs)),
        *_distributions(budgets, runs, noise),
        *_tap_comparisons(runs, budgets),
        *alike(budgets, runs),
        _tokens(pairs, same, budgets.ties),
    ]
    if gated:
        comparisons.append(largest("score", "guard score", budgets.score, _scores(pairs, found)))
        comparisons += decided_alike(found)
    if any(pair.undefended is not None for pair in pairs):
        comparisons.append(_told_apart(pairs, budgets))
    return ParityReport(
        (*comparisons, *more),
        sum(f.inside for f in found),
        sum(f.decisions for f in found),
        margins(found),
        histogram(found),
    )


def _all_rows(pair: Pair) -> Array:
    return np.ones(len(pair.reference.tokens), bool)


def _distributions(budgets: Budgets, runs: Sequence[Runs], noise: float | None) -> list[Comparison]:
    found = []
    if budgets.kl is not None:
        found.append(divergence(budgets.kl, runs))
    for gate, count, budget in (("top-1", 1, budgets.top1), ("top-5", 5, budgets.top5)):
        if budget is not None:
            found.append(likeliest(gate, count, budget, runs))
    if budgets.noise is not None:
        found.append(against_noise(budgets.noise, runs, noise or 0.0))
    return found


def _prefill_logits(runs: Sequence[Runs]) -> Iterable[Difference]:
    for name, ref, got, rows in runs:
        mask = ref.valid[:, -ref.prefill_logits.shape[1] :] & rows[:, None]
        yield name, mask, gap(ref.prefill_logits, got.prefill_logits)


def _decode_logits(runs: Sequence[Runs]) -> Iterable[Difference]:
    for name, ref, got, rows in runs:
        yield name, step_mask(ref) & rows[:, None], gap(ref.step_logits, got.step_logits)


def _scores(pairs: Sequence[Pair], found: Sequence[Flips]) -> Iterable[Difference]:
    """Gate by gate, where both saw the same stream."""
    for pair, flip in zip(pairs, found, strict=True):
        ref, got = pair.reference.guard_score, pair.forced.guard_score
        assert ref is not None
        far = np.full(ref.shape, np.inf) if got is None else gap(ref[..., None], got[..., None])
        for gate, rows in enumerate(flip.judged.T):
            mask = token_mask(pair.reference) & rows[:, None]
            yield f"{pair.name}, gate {gate}", mask, far[..., gate]


def _tap_comparisons(runs: Sequence[Runs], budgets: Budgets) -> list[Comparison]:
    """One comparison a guarded FFN output that the reference recorded and the candidate tapped."""
    if not all(got.taps for _, _, got, _ in runs):
        return []
    out = []
    for tap in sorted(tap for tap in runs[0][1].taps if tap.startswith(EDITED)):
        gaps = [
            (name, token_mask(ref) & rows[:, None], gap(ref.taps[tap], got.taps[tap]))
            for name, ref, got, rows in runs
        ]
        out.append(largest("ffn output", f"FFN output, {tap}", budgets.ffn_output, gaps))
    return out


def _tokens(pairs: Sequence[Pair], same: Sequence[Array], ties: float) -> Comparison:
    """Greedy tokens of the free run that differ from the reference's, up to each row's end.

    ties: see `Budgets`; behind such a choice a row's tokens answer another text.
    """
    wrong, compared, where = 0, 0, "nowhere"
    for pair, rows in zip(pairs, same, strict=True):
        if pair.free is None:
            continue
        ref, got = pair.reference, pair.free
        steps = ref.tokens.shape[1]
        padded = np.full(ref.tokens.shape, -1)
        padded[:, : got.tokens.shape[1]] = got.tokens[:, :steps]
        mask = step_mask(ref) & rows[:, None] & _same_text(ref, padded, ties)
        differs = (ref.tokens != padded) & mask
        wrong, compared = wrong + int(differs.sum()), compared + int(mask.sum())
        if differs.any() and where == "nowhere":
            row, step = np.argwhere(differs)[0]
            where = f"{pair.name}, row {row}, step {step}"
    quantity, source = "greedy tokens that differ", "greedy is exact"
    if ties:
        source = f"greedy is exact but between logits {ties:.3g} apart, which rounding may swap"
    return Comparison("tokens", quantity, wrong, None, source, compared, where)


def _same_text(ref: Trace, tokens: Array, ties: float) -> Array:
    """[B, n] bool: steps before a row's first other token, and with it unless the two are tied."""
    differs = ref.tokens != tokens
    chosen, other = (
        np.take_along_axis(ref.step_logits, np.maximum(each, 0)[..., None], axis=-1)[..., 0]
        for each in (ref.tokens, tokens)
    )
    first = differs & (np.cumsum(differs, axis=1) == 1)
    tied = first & (tokens >= 0) & (chosen - other <= ties) & (ties > 0)
    return np.asarray(np.cumsum(tied, axis=1) == 0)


def _told_apart(pairs: Sequence[Pair], budgets: Budgets) -> Comparison:
    """How blind the test is: guarded and unguarded logits must be `told_apart` budgets apart.

    Stated as the shortfall, so that 0 passes.
    """
    gaps = [
        gap(pair.reference.step_logits, pair.undefended.step_logits).max()
        for pair in pairs
        if pair.undefended is not None
    ]
    reach = float(max(gaps))
    wanted = budgets.told_apart
    shortfall = max(0.0, wanted * budgets.logits.limit - reach)
    source = f"guarded and unguarded logits differ by {reach:.3g}; {wanted:g} budgets are wanted"
    quantity = "blindness to the guard"
    return Comparison("blindness", quantity, shortfall, None, source, len(gaps), "all batches")
