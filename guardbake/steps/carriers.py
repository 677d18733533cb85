"""Where a runtime's loop carries a guard's state, and what else of the folder it needs for that.

A latched guard keeps its verdict from call to call (`passes.carry`). onnxruntime-genai hands the
recurrent states of a layer back, and the slot behind the last layer is free. transformers.js hands
back as many caches as config.json counts layers, in whatever type and sizes the decoder declares:
one more is counted. Which tokens stand for image features the first tells from their ids; the
second keeps ids from the decoder, so its embeddings are marked where they are made (`passes.mark`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from guardbake.bundle.canonical import canonical_lines
from guardbake.bundle.graphs import load_graph
from guardbake.errors import MalformedError, UnsupportedError
from guardbake.passes.carry import Slot
from guardbake.passes.mark import MARKS, MarkEmbeddings
from guardbake.spec import GuardSpec
from guardbake.steps.folder import ModelFolder
from guardbake.steps.records import read_record
from guardbake.steps.runtimes import GENAI_CONFIG, Runtime

CONFIG = "config.json"
# families whose loop was seen to name its caches by the number of layers, and nothing else
_COUNTED = ("llava", "qwen2_5_vl")


@dataclass(frozen=True)
class Carrier:
    """slot: in the decoder, None if nothing is carried. changed: other files of the folder, by
    name, as the loop needs them for that."""

    slot: Slot | None
    changed: Mapping[str, bytes]


def carrier_of(runtime: Runtime, folder: ModelFolder, spec: GuardSpec) -> Carrier:
    """What carries the guard's state in that runtime's loop, if it has one and can.

    Raises UnsupportedError if the folder's configuration lets the loop feed a prompt in chunks,
    each of which would be taken for a prompt, MalformedError if it does not say what is needed,
    SiteError if a graph that makes embeddings cannot be marked.
    """
    if spec.profile == "sequence" and runtime.name == "onnxruntime-genai":
        return Carrier(_behind_recurrent(folder.path), {})
    if spec.profile == "sequence" and runtime.name == "transformers.js":
        return _behind_caches(folder, any(sensor.pools for sensor in spec.sensors))
    return Carrier(None, {})


def _behind_recurrent(folder: Path) -> Slot:
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
        parts=("conv_state", "recurrent_state"),
        image_token=token if isinstance(token, int) else None,
    )


def _behind_caches(folder: ModelFolder, pools: bool) -> Carrier:
    path = folder.path / CONFIG
    config = read_record(path) if CONFIG in folder.files else {}
    if config.get("model_type") not in _COUNTED:
        return Carrier(None, {})
    layers = _at(config, "text_config", "num_hidden_layers")
    if not isinstance(layers, int) or layers < 1:
        raise MalformedError(
            found=f"{layers!r:.20} layers",
            expected="text_config.num_hidden_layers, by which the loop names its caches",
            where=str(path),
            remedy="use the configuration that the exporter wrote",
        )
    config["text_config"]["num_hidden_layers"] = layers + 1
    changed = {CONFIG: canonical_lines(config).encode()}
    if pools:
        changed |= _marked(folder)
    slot = Slot(f"past_key_values.{layers}.", f"present.{layers}.", ("key", "value"), marked=pools)
    return Carrier(slot, changed)


def _marked(folder: ModelFolder) -> dict[str, bytes]:
    """Every graph that makes embeddings, from token ids or from pixels, with its mark."""
    marked, made = {}, set()
    for name in sorted(set(folder.files) - set(folder.decoders)):
        model = load_graph(folder.path / name) if name.endswith(".onnx") else None
        outputs = set() if model is None else {str(value.name) for value in model.graph.outputs}
        if model is not None and outputs & set(MARKS):
            MarkEmbeddings()(model)
            marked[name] = bytes(ir.to_proto(model).SerializeToString())
            made |= outputs
    missing = sorted(set(MARKS) - made)
    if missing:
        raise UnsupportedError(
            found=f"no graph with an output {' or '.join(missing)}",
            expected=f"graphs that make {' and '.join(MARKS)}, to mark what stands for an image",
            where=str(folder.path),
            remedy="export the whole model, or use a guard that reads the last token alone",
        )
    return marked


def _at(config: Any, *keys: str) -> Any:
    for key in keys:
        config = config.get(key) if isinstance(config, dict) else None
    return config
