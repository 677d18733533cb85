"""Level A of a certificate: the guard's own nodes, run alone on golden vectors, against the law.

The nodes are taken out of the shipped graph, so nothing of the model is read or run; what takes
minutes for a decoder takes milliseconds for its guard.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from guardbake import semantics as law
from guardbake.bundle.verify import load_graph
from guardbake.check.comparison import Budgets, Comparison
from guardbake.check.golden_vectors import GoldenVectors
from guardbake.check.law import Agreement, hold_to_law
from guardbake.passes.extract import ExtractGuard
from guardbake.passes.insert import (
    IMAGES_IN,
    MEMORY_IN,
    MEMORY_OUT,
    SCORE_OUT,
    STATE_IN,
    STATE_OUT,
    gate_output,
    text_input,
)
from guardbake.plugins import REACHED, OpenSession
from guardbake.spec import GuardSpec

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

    [] if the recipe declares no budget for the law. Raises UnsupportedError if the runtime cannot
    run the guard's nodes, IntegrityError if `decoder` is no graph.
    """
    if budgets.law is None:
        return []
    agreements: list[Agreement] = []
    scores: list[Array] = []
    gates = range(len(spec.sensors))
    for feeds, seen in _calls(decoder, spec, vectors, open_session):
        agreements += hold_to_law(spec, seen, feeds, scored=True)
        if gates:
            scores.append(np.stack([seen[gate_output(SCORE_OUT, g, spec)] for g in gates], -1))
    source, limit = budgets.law.source, budgets.law.limit
    found = [
        Comparison("law", quantity, worst, limit, source, compared, WHERE)
        for quantity, (worst, compared) in _worst(agreements).items()
    ]
    if vectors.scores is not None:
        found.append(_recorded(np.concatenate(scores, axis=1), vectors, budgets))
    return found


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
    decoder: Path, spec: GuardSpec, vectors: GoldenVectors, open_session: OpenSession
) -> Iterator[tuple[Arrays, Arrays]]:
    """Feeds and what the nodes made of them: the prompt's vectors, then those of new tokens."""
    guard = ExtractGuard()(load_graph(decoder))
    session = open_session(bytes(ir.to_proto(guard).SerializeToString()), decoder.parent)
    types = {str(v.name): v.dtype.numpy() for v in guard.graph.inputs if v.dtype is not None}
    state = -vectors.mask[:, : vectors.prompt].sum(axis=1)
    carried: Arrays = {STATE_IN: state, MEMORY_IN: np.zeros((len(state), 3), np.float32)}
    total = vectors.mask.shape[1]
    for piece in (slice(0, vectors.prompt), slice(vectors.prompt, total)):
        if piece.start == total:
            return
        given = carried | _fed(spec, vectors, piece)
        feeds = {name: given[name].astype(types[name]) for name in types}
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
