"""Faults in what two runs showed: each breaks one gate of the certificate and no other.

Where a difference would break several gates at once, the reference is changed with the candidate:
a token is given logits, or a site an activation, for which only one of the budgets is broken.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from guardbake.bundle.manifest import DECODER
from guardbake.check.certificate import Gate, certificate
from guardbake.check.feeding import Way, same_however_fed
from guardbake.check.golden_vectors import GoldenVectors
from guardbake.check.parity import Pair, compare
from guardbake.errors import GuardbakeError
from guardbake.plugins import OpenSession, Trace
from guardbake.recipe import Recipe
from guardbake.spec import GuardSpec
from guardbake.steps.certify import gates_of, require_pass
from guardbake.steps.nodes import hold_nodes
from guardbake.steps.recheck import budgets_of

from tests.mutation.fault import Fault
from tests.mutation.faults_in_graph import renumber

Array = np.ndarray


@dataclass
class RunCase:
    """One batch in every run that a certificate compares, and what the other stages reported.

    folder: of the test's own, with the shipped graph. engine: its record, or why there is none.
    """

    recipe: Recipe
    spec: GuardSpec
    pair: Pair
    whole: Trace
    ways: Sequence[Way]
    vectors: GoldenVectors
    noise: float
    folder: Path
    open_session: OpenSession
    nodes: Sequence[str]
    behaviour: dict[str, Any]
    engine: dict[str, Any] | str

    def certify(self) -> list[Gate]:
        """Every gate, as a bake makes it of these runs."""
        return gates_of(self.recipe, self._reports())

    def exit_code(self) -> int:
        """What a bake would end with; 0 if it published."""
        reports = self._reports()
        content = certificate("runs", gates_of(self.recipe, reports), {}, reports)
        try:
            require_pass(content)
        except GuardbakeError as error:
            return error.exit_code
        return 0

    def _reports(self) -> dict[str, Any]:
        budgets = budgets_of(self.recipe.parity)
        found = hold_nodes(
            self.folder / DECODER, self.spec, self.vectors, self.open_session, budgets
        )
        found += same_however_fed(self.ways, self.whole, budgets)
        report = compare([self.pair], budgets, bool(self.spec.sensors), self.noise, found)
        return {
            "rewrite": {"nodes": self.nodes},
            "parity": report.to_json(),
            "behaviour": self.behaviour,
            "engine": self.engine,
        }

    def change(self, **traces: Trace) -> None:
        """Put other traces into the pair."""
        self.pair = replace(self.pair, **traces)  # type: ignore[arg-type]

    def tap(self, prefix: str, token: tuple[int, int], before: Array, after: Array) -> None:
        """Reference and candidate hold `before` and `after` [d] at one token of the first site."""
        for who, vector in (("reference", before), ("forced", after)):
            trace: Trace = getattr(self.pair, who)
            name = min(tap for tap in trace.taps if tap.startswith(prefix))
            array = trace.taps[name].copy()
            array[token] = vector
            self.change(**{who: replace(trace, taps={**trace.taps, name: array})})

    def say(self, before: Array, after: Array, place: tuple[slice, slice]) -> None:
        """The logits [V] of reference and candidate at new tokens [rows, steps]."""
        for who, logits in (("reference", before), ("forced", after)):
            trace: Trace = getattr(self.pair, who)
            array = trace.step_logits.copy()
            array[place] = logits
            self.change(**{who: replace(trace, step_logits=array)})


Change = Callable[[RunCase], object]


def axis(case: RunCase, index: int, size: float) -> Array:
    vector = np.zeros(case.spec.model.width, np.float32)
    vector[index] = size
    return vector


def last_word(case: RunCase) -> tuple[int, int]:
    """The last token of the first prompt."""
    return 0, case.pair.reference.valid.shape[1] - 1


ONE, ALL = slice(1), slice(None)


def ranked(case: RunCase, step: float) -> Array:
    """Logits [V]: token 0 likeliest, the next five `step` apart, the rest far behind."""
    logits = np.full(case.pair.reference.step_logits.shape[-1], -3.0, np.float32)
    logits[:6] = -step * np.arange(6)
    return logits


def swapped(logits: Array, one: int, other: int) -> Array:
    logits = logits.copy()
    logits[[one, other]] = logits[[other, one]]
    return logits


def weaken(case: RunCase) -> None:
    """A graph whose first edit is a tenth weaker, beside runs of the sound one."""
    model = ir.load(case.folder / DECODER)
    renumber("Edit", "basis", lambda a: a * np.float32(1.01))(model)
    ir.save(model, case.folder / DECODER)


def record_another_score(case: RunCase) -> None:
    assert case.vectors.scores is not None
    moved = case.vectors.scores + np.float32(2 * case.recipe.parity.score.budget)
    case.vectors = replace(case.vectors, scores=moved)


def far_off(case: RunCase) -> None:
    """A huge activation: half a unit beside it is no angle and no change of length."""
    huge = axis(case, 0, 1e6)
    case.tap("edited/", last_word(case), huge, huge + axis(case, 1, 0.5))


def turn(case: RunCase) -> None:
    """A tiny activation, in another direction."""
    case.tap("edited/", last_word(case), axis(case, 0, 1e-6), axis(case, 1, 1e-6))


def stretch(case: RunCase) -> None:
    case.tap("reached/", last_word(case), axis(case, 0, 1e-6), axis(case, 0, 2e-6))


def move_scores(case: RunCase) -> None:
    score = case.pair.forced.guard_score
    assert score is not None
    far = score + np.float32(2 * case.recipe.parity.score.budget)
    case.change(forced=replace(case.pair.forced, guard_score=far))


def decide_otherwise(case: RunCase) -> None:
    opened = case.pair.forced.guard_open
    assert opened is not None
    case.change(
        forced=replace(
            case.pair.forced, guard_open=opened ^ (np.arange(len(opened)) == 0)[:, None, None]
        )
    )


def move_a_prompt_logit(case: RunCase) -> None:
    logits = case.pair.forced.prefill_logits.copy()
    logits[(*last_word(case), 3)] += np.float32(2 * case.recipe.parity.logits.budget)
    case.change(forced=replace(case.pair.forced, prefill_logits=logits))


def spread(case: RunCase) -> None:
    """Where all words are nearly as likely, logits move most probability about."""
    level = 1e-4 * np.arange(case.pair.reference.step_logits.shape[-1], dtype=np.float32)[::-1]
    signs = np.where(np.arange(len(level)) % 2, 1, -1).astype(np.float32)
    case.say(level, level + np.float32(8e-6) * signs, (ONE, ONE))


def swap_first(case: RunCase) -> None:
    logits = ranked(case, 1e-6)
    case.say(logits, swapped(logits, 0, 1), (ONE, ONE))


def swap_sixth(case: RunCase) -> None:
    logits = ranked(case, 1e-6)
    case.say(logits, swapped(logits, 4, 5), (ALL, ALL))


def shift(case: RunCase) -> None:
    """All logits by one number: no probability changes."""
    moved = case.pair.forced.step_logits + np.float32(0.5 * case.recipe.parity.logits.budget)
    case.change(forced=replace(case.pair.forced, step_logits=moved))


def say_another_word(case: RunCase) -> None:
    assert case.pair.free is not None
    tokens = case.pair.free.tokens.copy()
    tokens[0, 0] += 1
    case.change(free=replace(case.pair.free, tokens=tokens))


def compare_with_itself(case: RunCase) -> None:
    case.change(undefended=case.pair.reference)


def cached_otherwise(case: RunCase) -> None:
    way, rows, trace = case.ways[-1]
    moved = trace.step_logits + np.float32(2e-4)
    case.ways = [*case.ways[:-1], (way, rows, replace(trace, step_logits=moved))]


def outcome(key: str, value: Any) -> Change:
    return lambda case: case.behaviour.update({key: case.behaviour[key] | {"value": value}})


def set_(name: str, value: Any) -> Change:
    return lambda case: setattr(case, name, value)


FAULTS: tuple[Fault[RunCase], ...] = tuple(
    Fault(name, "runs", gate, plant)
    for name, gate, plant in (
        ("no guard nodes", "presence", set_("nodes", [])),
        ("no engine where one is required", "engine", set_("engine", "not built: no compiler")),
        ("a node whose basis is x 1.01", "law", weaken),
        ("other scores on record", "canary", record_another_score),
        ("half a unit off a huge activation", "ffn output", far_off),
        ("a tiny activation turned", "cosine", turn),
        ("a tiny activation twice as long", "norm ratio", stretch),
        ("scores off", "score", move_scores),
        ("a gate that decides otherwise", "decisions", decide_otherwise),
        ("a logit of the prompt off", "logits", move_a_prompt_logit),
        ("probability moved about", "kl", spread),
        ("the two likeliest tokens swapped", "top-1", swap_first),
        ("the fifth and sixth tokens swapped", "top-5", swap_sixth),
        ("all logits off by one number", "noise", shift),
        ("another word", "tokens", say_another_word),
        ("a reference without its guard", "blindness", compare_with_itself),
        ("attacks as before", "attack", outcome("attack_ratio", 1.01)),
        ("harmless prompts refused", "harmless", outcome("harmless_rise", {"text": 0.06})),
        (
            "a runner that refuses less", "runners",
            lambda case: case.behaviour["runners"].update(differing=1),
        ),
        ("a cache that matters", "cache", cached_otherwise),
    )
)  # fmt: skip
