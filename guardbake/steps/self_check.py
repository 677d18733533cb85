"""Run a guarded graph beside the unguarded one, and hold its guard to the law.

Three times over a short prompt and one more token: with the guard's own thresholds, with every gate
forced open, with every gate forced shut. Shut, every output that the unguarded graph has must be
the same bits; open, the logits must move; and each score, verdict and edited tensor must be what
the law makes of the tensors that reached the guard. A guard whose state the loop carries is also
run as it is written, against itself with the state fed by hand.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from guardbake.check.law import (
    Agreement,
    hold_to_law,
    require_agreement,
    require_finite,
    require_identical,
    require_moved,
)
from guardbake.errors import EnvironmentFault
from guardbake.passes.branches import decoders
from guardbake.passes.carry import Slot, bare
from guardbake.passes.probe import FreeThresholds, TapGuard
from guardbake.passes.stand_in import StandIn
from guardbake.plugins import OpenSession, Session, find_session
from guardbake.spec import GuardSpec
from guardbake.steps.carried import Carried
from guardbake.steps.feeds import Feeds
from guardbake.steps.rewrite import array_beside
from guardbake.steps.runtimes import PLUGINS

Array = npt.NDArray[Any]
Mode = Literal["own", "open", "shut"]
Call = tuple[dict[str, Array], dict[str, Array]]  # feeds, outputs
_SHUT = np.float32(3e38)  # below the largest float32: a score less this is finite
_ANY_VOCABULARY = 1000
_SMALL = 1024  # bytes


def require_session() -> OpenSession:
    """What opens graphs for the check; EnvironmentFault if this environment cannot."""
    try:
        return find_session("onnx")
    except EnvironmentFault as error:
        raise EnvironmentFault(
            found=error.found,
            expected=error.expected,
            where="the numeric self-check",
            remedy=f"{error.remedy}; or say --no-self-check, which is put on record",
        ) from error


def self_check(
    plain: ir.Model,
    guarded: ir.Model,
    spec: GuardSpec,
    data: Path,
    open_session: OpenSession,
    head_size: int | None,
    slot: Slot | None = None,
) -> dict[str, Any]:
    """What was compared and how far apart it was, as JSON values.

    plain, guarded: the graph without and with the guard, both changed here for the check. data: the
    folder of their external data. slot: where `guarded` carries its state, if it does. Raises
    ParityError at the first disagreement, UnsupportedError if onnxruntime cannot run the graph or
    no feeds can be made for it.
    """
    replaced = StandIn(PLUGINS)(plain)
    StandIn(PLUGINS)(guarded)
    vocabulary, names = _vocabulary(plain.graph), [str(v.name) for v in plain.graph.outputs]
    carried = None
    if slot is not None:
        carried = Carried(open_session(serialised(guarded), data), guarded.graph, slot)
        bare(guarded)
    thresholds: dict[str, Array] = {}
    for _, decoder in decoders(guarded):
        TapGuard()(decoder)
        freed = FreeThresholds()(decoder)
        thresholds |= {name: tensor.numpy() for name, tensor in freed.items()}
    feeds = Feeds(plain.graph.inputs, vocabulary, head_size)
    still = _decode(open_session(serialised(plain), data), feeds, {})
    session = open_session(serialised(guarded), data)
    found: list[Agreement] = []
    for mode in modes_of(spec):
        forced = {name: in_mode(mode, array) for name, array in thresholds.items()}
        calls = _decode(session, Feeds(guarded.graph.inputs, vocabulary, head_size), forced)
        for (given, seen), (_, before) in zip(calls, still, strict=True):
            require_finite(seen, "logits")
            agreements = hold_to_law(spec, seen, given, scored=mode == "own")
            require_agreement(agreements)
            found += agreements
            if mode == "shut":
                found.append(require_identical(seen, before, names))
        if mode == "open" or not spec.sensors:
            require_moved(calls[-1][1]["logits"], still[-1][1]["logits"])
    if carried is not None:
        # GroupQueryAttention takes a second turn of one sequence alone
        one = Feeds(carried.inputs, vocabulary, head_size, rows=1)
        found.append(carried.agree(session, guarded.graph, one, thresholds))
    return {"calls": len(still), "replaced": list(replaced), "agreements": _summary(found)}


def _decode(session: Session, feeds: Feeds, forced: Mapping[str, Array]) -> list[Call]:
    """A prompt and, unless tokens are packed, one more token."""
    given = feeds.prompt() | dict(forced)
    calls = [(given, session.run(given))]
    if not feeds.packed:
        given = feeds.step(*calls[0]) | dict(forced)
        calls.append((given, session.run(given)))
    return calls


def modes_of(spec: GuardSpec) -> tuple[Mode, ...]:
    """Which thresholds a guard is checked with: its own, and those that force every gate."""
    return ("own", "open", "shut") if spec.sensors else ("own",)


def in_mode(mode: Mode, thresholds: Array) -> Array:
    """Thresholds that leave every gate to itself, or open it, or shut it."""
    if mode == "own":
        return thresholds
    return np.full_like(thresholds, _SHUT if mode == "shut" else -_SHUT)


def _summary(found: list[Agreement]) -> dict[str, Any]:
    """By quantity: the worst difference of all calls, and how many were compared."""
    rows: dict[str, Any] = {}
    for each in found:
        row = rows.setdefault(each.quantity, {"worst": 0.0, "difference": 0.0, "compared": 0})
        row["worst"] = max(row["worst"], each.worst)
        row["difference"] = max(row["difference"], each.difference)
        row["compared"] += each.compared
    return rows


def _vocabulary(graph: ir.Graph) -> int:
    logits = next(value for value in graph.outputs if value.name == "logits")
    last = logits.shape[-1] if logits.shape is not None and len(logits.shape) else None
    return last if isinstance(last, int) else _ANY_VOCABULARY


def serialised(model: ir.Model) -> bytes:
    """The graph as a file, but for small tensors outside it: shapes are inferred from these."""
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor) and tensor.nbytes <= _SMALL:
            value.const_value = ir.tensor(array_beside(tensor), name=tensor.name)
    return bytes(ir.to_proto(model).SerializeToString())
