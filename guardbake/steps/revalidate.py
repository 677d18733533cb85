"""Set a guard's thresholds anew for another graph of its model: quantised, cast, fused.

The guard was fitted on the float model. What its sensors read in the other graph is read there, on
the prompts that the thresholds were first set on, and compared with what the float model has.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from guardbake.artifact import load_guard, require_model
from guardbake.bundle.files import describe
from guardbake.bundle.graphs import load_graph
from guardbake.diagnose.prompts import EmbeddedPrompt, embed_prompts
from guardbake.errors import BehaviourError, UnsupportedError, UsageError
from guardbake.fit.recalibrate import FormShift, recalibrated, reference_scores
from guardbake.passes.insert import IMAGES_IN, SCORE_OUT, STATE_IN, gate_output
from guardbake.passes.stand_in import StandIn
from guardbake.plugins import OpenSession
from guardbake.samples import Form, Sample
from guardbake.semantics import CLOSED
from guardbake.spec import GuardSpec
from guardbake.steps.feeds import Feeds, head_size_of
from guardbake.steps.folder import ModelFolder, read_folder, unchanged
from guardbake.steps.rewrite import insert, load_decoder
from guardbake.steps.runtimes import PLUGINS
from guardbake.steps.self_check import serialised
from guardbake.steps.staging import Advance
from guardbake.vlm.capture import capture
from guardbake.vlm.load import Vlm
from guardbake.vlm.requests import Asking

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Calibration:
    """What is asked, of whom, and what must come of it.

    vlm: the model that the guard was fitted on; it embeds every prompt, as `asking` draws it.
    samples: the prompts to calibrate on, in every form, and their digest. rate: of harmless prompts
    of a form that may open a gate. loss: share of the harmful ones of a form that may open it on
    the float model and not on the other graph.
    """

    vlm: Vlm
    asking: Asking
    batch_size: int
    samples: Sequence[Sample]
    digest: str
    rate: float
    loss: float


def revalidate(
    source: Path, guard: Path, calibration: Calibration, session: OpenSession, advance: Advance
) -> tuple[GuardSpec, dict[str, Any]]:
    """The guard with thresholds for the decoder in `source`, and what was compared, as JSON values.

    Raises BehaviourError if a gate detects less than `calibration.loss` allows, UsageError for a
    guard without a gate, UnsupportedError for a folder of several decoders or a decoder that takes
    no embeddings, IntegrityError when the guard was fitted for another model or `source` changes
    meanwhile, SiteError where the decoder has not its sites, MalformedError for too few prompts or
    scores that are not finite.
    """
    spec = load_guard(guard)
    require_model(spec, calibration.vlm.model_digest, str(calibration.vlm.folder))
    _require_gate(spec, guard)
    folder = read_folder(source, load_graph)
    name = _only_decoder(folder)
    captured = capture(
        calibration.vlm,
        calibration.samples,
        sorted({s for sensor in spec.sensors for s in sensor.sites}, key=lambda site: site.depth),
        calibration.asking,
        calibration.batch_size,
        partial(advance, "reading the float model"),
    )
    with unchanged(source):
        graph = describe(source, name).sha256
        scores = _scores(folder, name, spec, calibration, session, advance)
    moved, gates = [], []
    for gate, sensor in enumerate(spec.sensors):
        reference = reference_scores(sensor, captured)
        samples, rate = calibration.samples, calibration.rate
        other, shifts = recalibrated(sensor, samples, scores[:, gate], reference, rate)
        _require_detection(gate, shifts, calibration.loss)
        moved.append(other)
        gates.append(
            {
                "thresholds": {"before": sensor.thresholds, "after": other.thresholds},
                "forms": {form: shift.to_json() for form, shift in shifts.items()},
            }
        )
    made_of: dict[str, Any] = {
        "guard": spec.digest,
        "graph": graph,
        "samples": calibration.digest,
        "rate": calibration.rate,
    }
    provenance = {**spec.provenance, "revalidated": made_of}
    changed = replace(spec, sensors=tuple(moved), provenance=provenance)
    return changed, made_of | {"loss": calibration.loss, "gates": gates}


def _require_gate(spec: GuardSpec, guard: Path) -> None:
    if not spec.sensors:
        raise UsageError(
            found=f"a guard of profile {spec.profile}, without a gate",
            expected="a guard whose gates have thresholds",
            where=str(guard),
            remedy="use guardbake apply: there is nothing to set anew",
        )


def _only_decoder(folder: ModelFolder) -> str:
    if len(folder.decoders) != 1:
        raise UnsupportedError(
            found=f"{len(folder.decoders)} decoders: {', '.join(folder.decoders)}",
            expected="one graph that reads prompts, for which thresholds are set",
            where=str(folder.path),
            remedy="merge them, or revalidate on the one that reads prompts and apply the guard",
        )
    return folder.decoders[0]


def _scores(
    folder: ModelFolder,
    name: str,
    spec: GuardSpec,
    calibration: Calibration,
    session: OpenSession,
    advance: Advance,
) -> Array:
    """[N, G] float64: each gate's score at a prompt's last token, in the decoder of that name.

    One prompt at a time, as some graphs do not know padding. The gates are shut, as they were when
    the thresholds were first set, so no score sees an edit.
    """
    model = load_decoder(folder.path / name)
    StandIn(PLUGINS)(model)
    shut = replace(spec, profile="sequence")
    insert(model, shut)
    inputs = list(model.graph.inputs)
    feeds = Feeds(inputs, 1, head_size_of(folder.path), rows=1)
    if feeds.packed or not any(value.name == "inputs_embeds" for value in inputs):
        raise UnsupportedError(
            found=f"inputs {', '.join(str(value.name) for value in inputs[:4])}",
            expected="a decoder that takes inputs_embeds, of one prompt",
            where=str(folder.path / name),
            remedy="export the decoder without its embeddings",
        )
    opened = session(serialised(model), (folder.path / name).parent)
    outputs = [gate_output(SCORE_OUT, gate, shut) for gate in range(len(shut.sensors))]
    found = []
    for prompt in _embedded(calibration):
        seen = opened.run(_call(feeds, prompt))
        found.append([float(seen[output][0, -1]) for output in outputs])
        advance("reading the graph", len(found), len(calibration.samples))
    return np.array(found)


def _embedded(calibration: Calibration) -> Iterator[EmbeddedPrompt]:
    """A batch in memory at a time."""
    size = calibration.batch_size
    for begin in range(0, len(calibration.samples), size):
        some = calibration.samples[begin : begin + size]
        yield from embed_prompts(calibration.vlm, some, calibration.asking, size)


def _call(feeds: Feeds, prompt: EmbeddedPrompt) -> dict[str, Array]:
    """The whole prompt in one call, its gates decided and closed."""
    call = feeds.prompt(len(prompt))
    known = {
        "inputs_embeds": prompt.embeds[None].float().numpy(),
        "position_ids": prompt.positions[..., None, :].numpy(),
        IMAGES_IN: prompt.image[None],
        STATE_IN: np.array([CLOSED]),
    }
    return call | {n: value.astype(call[n].dtype) for n, value in known.items() if n in call}


def _require_detection(gate: int, shifts: Mapping[Form, FormShift], loss: float) -> None:
    worst = max(shifts, key=lambda form: shifts[form].lost)
    if shifts[worst].lost > loss:
        before, _, after = shifts[worst].harmful_open
        raise BehaviourError(
            found=f"harmful {worst} prompts open gate {gate} in {after:.2f} of cases, and in "
            f"{before:.2f} on the model it was fitted on",
            expected=f"at most {loss:g} less",
            where="the prompts to calibrate on, in the other graph",
            remedy="quantise less coarsely, leave the layers up to the sensor's in floating point, "
            "or allow more with --loss",
        )
