"""Which runtime a folder is for, and what of a guard its decoding loop can carry.

A guard whose gate is latched for a sequence needs inputs that somebody feeds at each step. A
runtime with a loop of its own does not know them: the session would refuse to run, or worse, the
user would preset the input and the gate would never open. Where the loop hands states back, a slot
of theirs carries the guard's (`steps.carriers`); elsewhere such a guard is refused.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Literal

import onnx_ir as ir

from guardbake.errors import UnsupportedError
from guardbake.passes.carry import IDS, Slot

RuntimeName = Literal["onnxruntime", "onnxruntime-genai", "transformers.js", "tensorrt-edgellm"]
PLUGINS = "trt_edgellm"  # operator domain
GENAI_CONFIG = "genai_config.json"


@dataclass(frozen=True)
class Runtime:
    """inputs, outputs: whether its loop takes a decoder with more of them than it knows.

    plugins: whether the graphs hold operators that only this runtime has.
    """

    name: RuntimeName
    inputs: bool
    outputs: bool
    plugins: bool = False


RUNTIMES: dict[str, Runtime] = {
    runtime.name: runtime
    for runtime in (
        Runtime("onnxruntime", inputs=True, outputs=True),
        Runtime("onnxruntime-genai", inputs=False, outputs=True),
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
            raise UnsupportedError(
                found=f"a guard of profile {profile} that adds the {kind} {', '.join(added)}",
                expected=f"a guard of profile always or token: {runtime.name} runs its own loop, "
                f"which takes a decoder without further {kind}",
                where=f"a folder for {runtime.name}",
                remedy="fit a guard of such a profile, or, if a loop of your own runs the decoder, "
                "name it with --runtime onnxruntime",
            )
