"""Which runtime a folder is for, and what of a guard its decoding loop can carry.

A guard whose gate is latched for a sequence needs inputs that somebody feeds at each step. A
runtime with a loop of its own does not know them: the session would refuse to run, or worse, the
user would preset the input and the gate would never open. Where the loop hands recurrent states
back, a slot of theirs carries the guard's (`passes.carry`); elsewhere such a guard is refused.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import onnx_ir as ir

from guardbake.errors import MalformedError, UnsupportedError
from guardbake.passes.carry import IDS, Slot
from guardbake.steps.records import read_record

RuntimeName = Literal["onnxruntime", "onnxruntime-genai", "transformers.js", "tensorrt-edgellm"]
PLUGINS = "trt_edgellm"  # operator domain
GENAI_CONFIG = "genai_config.json"


@dataclass(frozen=True)
class Runtime:
    """inputs, outputs: whether its loop takes a decoder with more of them than it knows.

    plugins: whether the graphs hold operators that only this runtime has. slots: whether its loop
    hands recurrent states back.
    """

    name: RuntimeName
    inputs: bool
    outputs: bool
    plugins: bool = False
    slots: bool = False


RUNTIMES: dict[str, Runtime] = {
    runtime.name: runtime
    for runtime in (
        Runtime("onnxruntime", inputs=True, outputs=True),
        Runtime("onnxruntime-genai", inputs=False, outputs=True, slots=True),
        Runtime("transformers.js", inputs=False, outputs=True),
        Runtime("tensorrt-edgellm", inputs=False, outputs=False, plugins=True),
    )
}


def runtime_of(files: Collection[str], decoders: Sequence[ir.Model]) -> Runtime:
    """By what only that runtime has: an operator, a configuration file, a place in the folder."""
    if any(node.domain == PLUGINS for model in decoders for node in model.graph):
        return RUNTIMES["tensorrt-edgellm"]
    names = [PurePosixPath(file) for file in files]
    if any(name.name == GENAI_CONFIG for name in names):
        return RUNTIMES["onnxruntime-genai"]
    if any(
        name.parent.name == "onnx" and name.name.startswith("decoder_model_merged")
        for name in names
    ):
        return RUNTIMES["transformers.js"]
    return RUNTIMES["onnxruntime"]


def require_fit(
    runtime: Runtime, before: ir.Graph, after: ir.Graph, profile: str, slot: Slot | None
) -> None:
    """UnsupportedError if the guard added inputs or outputs that the runtime cannot carry."""
    known = () if slot is None else (slot.past, slot.present, IDS)
    for kind, allowed, old, new in (
        ("inputs", runtime.inputs, before.inputs, after.inputs),
        ("outputs", runtime.outputs, before.outputs, after.outputs),
    ):
        names = {str(v.name) for v in new} - {str(v.name) for v in old}
        added = sorted(name for name in names if not name.startswith(known))
        if added and not allowed:
            others = "always or token" if runtime.outputs else "always"
            raise UnsupportedError(
                found=f"a guard of profile {profile} that adds the {kind} {', '.join(added)}",
                expected=f"a guard of profile {others}: {runtime.name} runs its own loop, which "
                f"takes a decoder without further {kind}",
                where=f"a folder for {runtime.name}",
                remedy="fit a guard of such a profile, or, if a loop of your own runs the decoder, "
                "name it with --runtime onnxruntime",
            )


def slot_of(runtime: Runtime, folder: Path) -> Slot | None:
    """Where the runtime's loop carries a guard's state; None if it has no such place.

    Raises UnsupportedError if the folder's configuration lets the loop feed a prompt in chunks,
    each of which would be taken for a prompt, MalformedError if it does not say what is needed.
    """
    if not runtime.slots:
        return None
    path = folder / GENAI_CONFIG
    config = read_record(path)
    if _at(config, "search", "chunk_size") is not None:
        raise UnsupportedError(
            found="search.chunk_size, with which a prompt is fed in chunks",
            expected="a prompt in one call, at the end of which the gate decides",
            where=str(path),
            remedy="remove chunk_size, or use a guard of profile token",
        )
    layers = _at(config, "model", "decoder", "num_hidden_layers")
    past = _at(config, "model", "decoder", "inputs", "past_key_names")
    present = _at(config, "model", "decoder", "outputs", "present_key_names")
    before, after = (str(name).rpartition(".")[0] for name in (past, present))
    if not isinstance(layers, int) or not before.count("%d") == after.count("%d") == 1:
        raise MalformedError(
            found=f"{layers!r:.20} layers, caches {past!r:.60} and {present!r:.60}",
            expected="num_hidden_layers, past_key_names and present_key_names with one %d",
            where=str(path),
            remedy="use the configuration that the exporter wrote",
        )
    token = _at(config, "model", "image_token_id")
    return Slot(
        past=f"{before.replace('%d', str(layers))}.",
        present=f"{after.replace('%d', str(layers))}.",
        image_token=token if isinstance(token, int) else None,
    )


def _at(config: Any, *keys: str) -> Any:
    for key in keys:
        config = config.get(key) if isinstance(config, dict) else None
    return config
