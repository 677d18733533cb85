"""Hold what a guarded graph computed against the law, on the very tensors that reached its guard.

The law is evaluated in float64. Limits are those of float32 sums and of the tensor's own dtype, not
of taste: a sum of n products is off by at most about sqrt(n) u times their size (Higham and Mary
2019, section 2), with u = 2^-24; the last rounding is one unit of the dtype that the graph stores.
So is the first: where onnxruntime has no kernel for half precision it computes in float32, and
hands a guard, which reads in float32, the value before the rounding that everybody else sees.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from guardbake import semantics as law
from guardbake.errors import ParityError
from guardbake.passes.insert import (
    IMAGES_IN,
    MEMORY_IN,
    MEMORY_OUT,
    OPEN_OUT,
    SCORE_OUT,
    STATE_IN,
    STATE_OUT,
    gate_output,
    text_input,
)
from guardbake.plugins import EDITED, REACHED
from guardbake.spec import Edit, GuardSpec, Sensor

Array = npt.NDArray[Any]
Arrays = Mapping[str, Array]
UNIT = 2.0**-24  # of float32, the guard's own precision
SPREAD = 4.0  # standard deviations of a sum's rounding error that are put up with
_STORED = {np.dtype(np.float16): 2.0**-11, np.dtype(np.float32): UNIT}
_SMALLEST = {np.dtype(np.float16): 2.0**-24, np.dtype(np.float32): 0.0}
_LARGEST = float(np.finfo(np.float16).max)


@dataclass(frozen=True)
class Agreement:
    """worst: the largest difference as a share of its limit, difference: itself. compared: how many
    tokens or verdicts. Verdicts and what a closed gate lets through have no limit, they are equal:
    `exact`, and `worst` is 0 or infinite.
    """

    quantity: str
    worst: float
    difference: float
    compared: int
    exact: bool = False


def hold_to_law(spec: GuardSpec, seen: Arrays, feeds: Arrays, scored: bool) -> list[Agreement]:
    """Every edit, score and verdict of one call.

    seen: what a tapped graph gave (`passes.probe`) for `feeds`. scored: the thresholds are the
    guard's own, so the scores can be compared.
    """
    found = []
    for gate, sensor in enumerate(spec.sensors):
        scores = seen[gate_output(SCORE_OUT, gate, spec)]
        if scored:
            found += _scores(spec, gate, sensor, scores, seen, feeds)
    if spec.sensors:
        found += _verdicts(spec, seen, feeds)
    return found + [each for edit in spec.edits for each in _edit(spec, edit, seen, feeds)]


def require_agreement(found: Iterable[Agreement]) -> None:
    """ParityError at the first that disagrees by more than rounding explains."""
    for each in found:
        if not each.worst <= 1:
            seen = "other values" if each.exact else f"a difference of {each.difference:.3g}"
            wanted = (
                "the values that the law gives, exactly"
                if each.exact
                else f"at most a {each.worst:.3g}th of that, the rounding of float32"
            )
            raise _fault(f"{each.quantity}: {seen}", wanted)


def _scores(
    spec: GuardSpec, gate: int, sensor: Sensor, scores: Array, seen: Arrays, feeds: Arrays
) -> list[Agreement]:
    stored = [seen[f"{REACHED}{site}"] for site in sensor.sites]
    xs = [x.astype(np.float64) for x in stored]
    wide = law.features(xs, sensor.readings)
    size, first = np.zeros(scores.shape), np.zeros(scores.shape)
    for x, kept, reading in zip(xs, stored, sensor.readings, strict=True):
        gain = float(np.linalg.norm(reading.directions))
        size += (_norm(x) + _norm(reading.centre)) * gain
        first += _STORED[kept.dtype] * _norm(x) * gain
    sums = np.sqrt(spec.model.width) * size + max(map(abs, sensor.thresholds))
    limit = SPREAD * UNIT * sums + first
    if not sensor.pools:
        wanted = law.score(wide, sensor.thresholds)
        return [_within(f"score of gate {gate}", scores - wanted, limit)]
    state = feeds["attention_mask"], feeds[IMAGES_IN], feeds[MEMORY_IN]
    wanted, memory = law.pooled_score(wide, sensor.thresholds, *state)
    limit = 2 * limit.max(axis=1, keepdims=True)  # of the token, and of the mean of earlier ones
    tokens = feeds["attention_mask"].shape[1]
    return [
        _within(f"score of gate {gate}", scores - wanted, limit),
        _within("memory", seen[MEMORY_OUT] - memory, tokens * limit),
    ]


def _verdicts(spec: GuardSpec, seen: Arrays, feeds: Arrays) -> list[Agreement]:
    """What the gates make of the scores the graph computed: the same, without any limit."""
    memory = feeds.get(MEMORY_IN) if spec.pools else None
    opened, states = [], []
    for gate in range(len(spec.sensors)):
        scores = seen[gate_output(SCORE_OUT, gate, spec)]
        mask = feeds.get("attention_mask", np.ones(scores.shape, np.int64))  # packed: all are real
        if spec.profile == "token":
            opened.append(law.gate_by_token(scores, mask))
            continue
        own = law.own_state(feeds[STATE_IN], gate)
        verdict, after = law.gate_by_sequence(scores, mask, own, memory)
        opened.append(verdict)
        states.append(after)
    found = []
    for gate, wanted in enumerate(opened):
        name = gate_output(OPEN_OUT, gate, spec)
        found.append(_equal(name, seen[name], wanted))
    if states:
        found.append(_equal(STATE_OUT, seen[STATE_OUT], law.joint_state(states)))
    return found


def _edit(spec: GuardSpec, edit: Edit, seen: Arrays, feeds: Arrays) -> list[Agreement]:
    y, after = seen[f"{REACHED}{edit.site}"], seen[f"{EDITED}{edit.site}"]
    opened = np.ones(y.shape[:-1], bool)
    if spec.sensors:
        opened = seen[gate_output(OPEN_OUT, edit.gate, spec)]
    passed = _equal(f"{edit.site} while closed", after[~opened], y[~opened])
    wide = y[opened].astype(np.float64)[None]
    text = feeds.get(text_input(edit.site))
    if text is not None:  # one a row: its own for each open token
        wide = wide[0][:, None]
        text = np.repeat(text, opened.sum(axis=1), axis=0).astype(np.float64)
    wanted = law.edited(wide, edit, text).reshape(-1, y.shape[-1])
    if y.dtype == np.float16:
        wanted = np.clip(wanted, -_LARGEST, _LARGEST)
    limit = _limit(edit, y[opened], wanted)
    gap = np.linalg.norm(after[opened].astype(np.float64) - wanted, axis=-1)
    return [passed, _within(f"{edit.site} while open", gap, limit)]


def _limit(edit: Edit, y: Array, wanted: Array) -> Array:
    """The largest distance |graph - law| of a token, [tokens]."""
    width = y.shape[-1]
    reached = size = _norm(y.astype(np.float64))
    gain = 1.0
    for branch in edit.branches:
        gains = 1.0 if branch.gains is None else float(np.abs(branch.gains).max())
        gain *= 1.0 + abs(branch.strength) * gains
        size = size + _norm(branch.centre)
    if edit.push is not None:
        gain += abs(edit.strength) * float(np.linalg.norm(edit.push))
    ends = _norm(wanted) + gain * reached
    stored = _STORED[y.dtype] * ends + _SMALLEST[y.dtype] * np.sqrt(width)
    return np.asarray(SPREAD * UNIT * np.sqrt(width) * gain * (size + 1.0) + stored)


def _norm(x: Array) -> Array:
    return np.asarray(np.linalg.norm(x, axis=-1))


def _within(quantity: str, gap: Array, limit: Array) -> Agreement:
    size = np.abs(gap)
    share = np.where(np.isfinite(size), size / limit, np.inf)
    worst = float(share.max(initial=0.0))
    return Agreement(quantity, worst, float(size.max(initial=0.0)), size.size)


def _equal(quantity: str, got: Array, wanted: Array) -> Agreement:
    """The same bits, so that a number that is none equals itself."""
    same = got.shape == wanted.shape and got.astype(wanted.dtype).tobytes() == wanted.tobytes()
    off = 0.0 if same else float("inf")
    return Agreement(quantity, off, off, int(np.prod(got.shape[:1])), exact=True)


def require_identical(got: Arrays, wanted: Arrays, names: Sequence[str]) -> Agreement:
    """The named outputs of both, bit for bit; ParityError at the first that differs."""
    for name in names:
        if got[name].dtype != wanted[name].dtype:
            raise _fault(f"{name} in {got[name].dtype}", f"{wanted[name].dtype}")
        require_agreement([_equal(f"{name} while the gate is closed", got[name], wanted[name])])
    return Agreement("outputs while every gate is closed", 0.0, 0.0, len(names))


def require_finite(arrays: Arrays, name: str) -> None:
    if not np.isfinite(arrays[name]).all():
        raise _fault(f"{name} with values that are not numbers", "finite numbers")


def require_moved(got: Array, still: Array) -> None:
    """ParityError if an open guard left every logit as it was: it is not on their way."""
    if np.array_equal(got, still):
        raise _fault("an open guard that changes no logit", "an edit on the way to the logits")


def _fault(found: str, expected: str) -> ParityError:
    return ParityError(
        found=found,
        expected=expected,
        where="the numeric self-check of the guarded graph",
        remedy="do not ship this graph; report the exporter and its version",
    )
