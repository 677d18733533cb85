"""Level A of a certificate: the guard's own nodes, run alone on golden vectors, against the law.

The nodes are taken out of the shipped graph, so nothing of the model is read or run; what takes
minutes for a decoder takes milliseconds for its guard.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from guardbake import semantics as law
from guardbake.bundle.verify import bundled_graph
from guardbake.check.comparison import Budgets, Comparison
from guardbake.check.golden_vectors import GoldenVectors
from guardbake.check.law import Agreement, hold_to_law
from guardbake.passes.extract import ExtractGuard
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
from guardbake.passes.probe import FreeThresholds
from guardbake.plugins import EDITED, REACHED, OpenSession, Session
from guardbake.spec import GuardSpec
from guardbake.steps.self_check import in_mode, modes_of

Array = npt.NDArray[Any]
Arrays = dict[str, Array]
WHERE = "golden vectors"


def hold_nodes(
    decoder: Path,
    spec: GuardSpec,
    vectors: GoldenVectors,
    open_session: OpenSession,
    budgets: Budgets,
) -> list[Comparison]:
    """Every edit, score and verdict against the law, and the scores against the recorded ones.

    With the guard's own thresholds, with every gate forced open, and with every gate forced shut.

    [] if the recipe declares no budget for the law. Raises UnsupportedError if the runtime cannot
    run the guard's nodes, IntegrityError if `decoder` is no graph.
    """
    if budgets.law is None:
        return []
    guard = ExtractGuard()(bundled_graph(decoder))
    missing = _missing(guard.graph, spec)
    if missing:  # there is nothing to run, and that is a failure
        source, where = f"missing: {', '.join(missing)}", WHERE
        return [Comparison("law", "guard nodes", len(missing), None, source, len(missing), where)]
    agreements, scores = _run(guard, decoder.parent, spec, vectors, open_session)
    source, limit = budgets.law.source, budgets.law.limit
    found = [
        Comparison("law", quantity, worst, limit, source, compared, WHERE)
        for quantity, (worst, compared) in _worst(agreements).items()
    ]
    if vectors.scores is not None:
        found.append(_recorded(scores, vectors, budgets))
    return found


def _missing(graph: ir.Graph, spec: GuardSpec) -> list[str]:
    """What the guard's nodes should be given and make, and are not or do not."""
    sites = {edit.site for edit in spec.edits}
    wanted = {f"{EDITED}{site}" for site in sites}
    sites |= {site for sensor in spec.sensors for site in sensor.sites}
    wanted |= {f"{REACHED}{site}" for site in sites}
    for name in (SCORE_OUT, OPEN_OUT):
        wanted |= {gate_output(name, gate, spec) for gate in range(len(spec.sensors))}
    wanted |= {STATE_OUT} if spec.profile == "sequence" else set()
    wanted |= {MEMORY_OUT} if spec.pools else set()
    return sorted(wanted - {str(value.name) for value in (*graph.inputs, *graph.outputs)})


def _run(
    guard: ir.Model,
    data: Path,
    spec: GuardSpec,
    vectors: GoldenVectors,
    open_session: OpenSession,
) -> tuple[list[Agreement], Array]:
    """What the law says of every call; and the scores [B, S, G] under the own thresholds."""
    thresholds = {name: tensor.numpy() for name, tensor in FreeThresholds()(guard).items()}
    types = {str(v.name): v.dtype.numpy() for v in guard.graph.inputs if v.dtype is not None}
    session = open_session(bytes(ir.to_proto(guard).SerializeToString()), data)
    agreements: list[Agreement] = []
    scores = [np.zeros((*vectors.mask.shape[:1], 0, len(spec.sensors)), np.float32)]
    for mode in modes_of(spec):
        forced = {name: in_mode(mode, array) for name, array in thresholds.items()}
        for feeds, seen in _calls(session, types, spec, vectors, forced):
            agreements += hold_to_law(spec, seen, feeds, scored=mode == "own")
            if spec.sensors and mode == "own":
                names = [gate_output(SCORE_OUT, gate, spec) for gate in range(len(spec.sensors))]
                scores.append(np.stack([seen[name] for name in names], axis=-1))
    if not spec.sensors:  # what no gate can close is never seen closed
        agreements = [each for each in agreements if each.compared]
    return agreements, np.concatenate(scores, axis=1)


def _worst(agreements: list[Agreement]) -> dict[str, tuple[float, int]]:
    """By quantity over all calls: the largest share of what rounding explains, numbers compared."""
    found: dict[str, tuple[float, int]] = {}
    for each in agreements:
        worst, compared = found.get(each.quantity, (0.0, 0))
        found[each.quantity] = max(worst, each.worst), compared + each.compared
    return found


def _recorded(scores: Array, vectors: GoldenVectors, budgets: Budgets) -> Comparison:
    """Padding is scored by nobody."""
    assert vectors.scores is not None
    real = vectors.mask == 1
    same = scores.shape == vectors.scores.shape
    gaps = np.abs(scores - vectors.scores)[real] if same else np.array([np.inf])
    worst = float(np.where(np.isfinite(gaps), gaps, np.inf).max(initial=0.0))
    budget = budgets.score
    return Comparison(
        "canary", "recorded scores", worst, budget.limit, budget.source, gaps.size, WHERE
    )


def _calls(
    session: Session,
    types: Mapping[str, npt.DTypeLike],
    spec: GuardSpec,
    vectors: GoldenVectors,
    thresholds: Arrays,
) -> Iterator[tuple[Arrays, Arrays]]:
    """Feeds and what the nodes made of them: the prompt's vectors, then those of new tokens.

    types: dtype of each input by name.
    """
    state = -vectors.mask[:, : vectors.prompt].sum(axis=1)
    carried: Arrays = {STATE_IN: state, MEMORY_IN: np.zeros((len(state), 3), np.float32)}
    total = vectors.mask.shape[1]
    for piece in (slice(0, vectors.prompt), slice(vectors.prompt, total)):
        if piece.start == total:
            return
        given = carried | thresholds | _fed(spec, vectors, piece)
        feeds = {name: given[name].astype(dtype) for name, dtype in types.items()}
        made = session.run(feeds)
        reached = {name: value for name, value in feeds.items() if name.startswith(REACHED)}
        yield feeds, {**reached, **made}
        for source, target in ((STATE_OUT, STATE_IN), (MEMORY_OUT, MEMORY_IN)):
            carried[target] = made.get(source, carried[target])


def _fed(spec: GuardSpec, vectors: GoldenVectors, piece: slice) -> Arrays:
    feeds: Arrays = {f"{REACHED}{site}": x[:, piece] for site, x in vectors.reached.items()}
    feeds["attention_mask"] = vectors.mask[:, : piece.stop]
    feeds[IMAGES_IN] = vectors.image_mask[:, piece]
    for edit in spec.edits:
        if edit.kind == "replace":  # what was heard: the coordinates of the prompt's last token
            last = vectors.reached[str(edit.site)][:, [vectors.prompt - 1]]
            heard = law.coordinates(last, edit.branches[0])[:, 0]
            feeds[text_input(edit.site)] = heard.astype(np.float32)
    return feeds
