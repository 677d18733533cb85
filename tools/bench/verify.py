"""How long `guardbake verify` takes for a bundle of a 7B model's shape, its weights left unread.

The decoder has the layers, widths and matrices of Qwen2.5-VL-7B in float32, and the guard five
readings and three edits of rank 64. Weights are holes in sparse files: nothing of them is written,
and a verify that read them would take minutes.

    python tools/bench/verify.py [FOLDER]      the folder is made, and removed afterwards
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import onnx_ir as ir

from guardbake.artifact import save_guard
from guardbake.batch import Batch
from guardbake.bundle.files import FileEntry, describe, list_files
from guardbake.bundle.manifest import (
    CERTIFICATE,
    DECODER,
    GUARD,
    RECIPE,
    SMALL,
    EngineNotBuilt,
    Manifest,
    Origins,
    write_manifest,
)
from guardbake.bundle.papers import papers_of
from guardbake.check.certificate import Gate, certificate
from guardbake.check.golden import Golden, save_golden
from guardbake.check.golden_vectors import golden_vectors
from guardbake.passes.insert import InsertGuard
from guardbake.plugins import REACHED, Trace
from guardbake.site import Site
from guardbake.spec import Branch, Edit, GuardSpec, ModelIdentity, Reading, Sensor
from guardbake.steps.recheck import GOLDEN

WIDTH, LAYERS, HIDDEN, VOCABULARY, RANK = 3584, 28, 18944, 152064, 64
READ, EDITED = (11, 13, 15, 17, 19), (20, 21, 22)
OTHERS = {  # bytes of what else such a bundle holds
    "vision.onnx.data": 2_700_000_000,
    "embedding.onnx.data": 2_180_000_000,
    "processor/tokenizer.json": 7_000_000,
    "processor/vocab.json": 2_800_000,
    "processor/merges.txt": 1_700_000,
}
RNG = np.random.default_rng(0)
BUDGET = {"budget": 1e-2, "source": "only the time is asked for here"}


class Decoder:
    """The graph: four products of attention, thirty more nodes, and three of the FFN a layer."""

    def __init__(self, folder: Path) -> None:
        self.nodes: list[ir.Node] = []
        self.weights: list[ir.Value] = []
        self.bytes = 0
        self._folder = folder

    def model(self) -> ir.Model:
        x = ir.val("inputs_embeds", ir.DataType.FLOAT, ["batch", "sequence", WIDTH])
        inputs = [x, ir.val("attention_mask", ir.DataType.INT64, ["batch", "total"])]
        for layer in range(LAYERS):
            x = self._layer(f"/model/layers.{layer}", layer, x)
        logits = self._product(x, "logits", WIDTH, VOCABULARY)
        graph = ir.Graph(
            inputs,
            [logits],
            nodes=self.nodes,
            initializers=self.weights,
            opset_imports={"": 23},
            name="decoder",
        )
        return ir.Model(graph, ir_version=10)

    def _layer(self, name: str, layer: int, x: ir.Value) -> ir.Value:
        h = x
        for number in range(30):
            h = self._node("Identity", [h], f"{name}/{number}", WIDTH)
        for role in "qkvo":
            h = self._product(h, f"{name}/{role}", WIDTH, WIDTH)
        x = self._node("Add", [x, h], f"{name}/attended", WIDTH)
        wide = [self._product(x, f"{name}/{role}", WIDTH, HIDDEN) for role in ("gate", "up")]
        inner = self._node("Mul", wide, f"{name}/inner", HIDDEN)
        y = self._product(inner, Site(layer, "ffn_output").onnx_value, HIDDEN, WIDTH)
        return self._node("Add", [x, y], f"{name}/residual", WIDTH)

    def _product(self, x: ir.Value, name: str, rows: int, columns: int) -> ir.Value:
        size = 4 * rows * columns
        tensor = ir.ExternalTensor(
            f"{DECODER}.data",
            self.bytes,
            size,
            ir.DataType.FLOAT,
            shape=ir.Shape([rows, columns]),
            name=f"{name}.weight",
            base_dir=self._folder,
        )
        self.bytes += size
        self.weights.append(ir.val(f"{name}.weight", const_value=tensor))
        return self._node("MatMul", [x, self.weights[-1]], name, columns)

    def _node(self, kind: str, inputs: list[ir.Value], name: str, columns: int) -> ir.Value:
        node = ir.node(kind, inputs, name=name)
        node.outputs[0].name, node.outputs[0].dtype = name, ir.DataType.FLOAT
        node.outputs[0].shape = ir.Shape(["batch", "sequence", columns])
        self.nodes.append(node)
        return node.outputs[0]


def vectors(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def guard() -> GuardSpec:
    def basis(columns: int) -> np.ndarray:
        return np.linalg.qr(RNG.standard_normal((WIDTH, columns)))[0].astype(np.float32)

    readings = [Reading(Site(n, "residual"), basis(2), vectors(WIDTH)) for n in READ]
    edits = [
        Edit(
            Site(layer, "ffn_output"),
            "care",
            (
                Branch("visual", basis(RANK), vectors(WIDTH), 1.0),
                Branch("text", basis(RANK), vectors(WIDTH), 1.0),
            ),
            fusion="adaptive",
        )
        for layer in EDITED
    ]
    sensor = Sensor(tuple(readings), (0.1, 0.3, 0.2))
    identity = ModelIdentity("qwen2_5_vl", LAYERS, WIDTH, "0" * 64)
    return GuardSpec(identity, "care", "sequence", (sensor,), tuple(edits), {})


def golden(spec: GuardSpec) -> Golden:
    """Vectors alone, of random numbers; no runs."""
    rows, prompt, steps = 6, 12, 4
    mask = np.ones((rows, prompt), np.int64)
    images = np.zeros((rows, prompt), bool)
    images[::2, 2:6] = True
    sites = [*spec.sensors[0].sites, *(edit.site for edit in spec.edits)]
    logits = np.zeros((rows, steps, 1), np.float32)
    taps = {f"{REACHED}{site}": vectors(rows, prompt + steps - 1, WIDTH) for site in sites}
    trace = Trace(
        mask[:, :steps], logits, logits, mask[:, 0] * steps, mask == 1, None, None, None, taps
    )
    batch = Batch(mask, mask, images, None, None)
    return Golden({}, golden_vectors(spec, batch, trace), spec.digest, 1.0)


def write_bundle(folder: Path) -> int:
    """Returns its size in bytes, holes included."""
    spec, decoder = guard(), Decoder(folder)
    model = decoder.model()
    InsertGuard(spec)(model)
    ir.save(model, folder / DECODER)
    (folder / "processor").mkdir()
    for name, size in {f"{DECODER}.data": decoder.bytes, **OTHERS}.items():
        with (folder / name).open("wb") as file:
            file.truncate(size)
    save_guard(spec, folder / GUARD)
    save_golden(folder / GOLDEN, golden(spec))
    names = ("logits", "score", "ffn_output", "margin_band", "law")
    parity = {"steps": 16, **dict.fromkeys(names, BUDGET)}
    (folder / RECIPE).write_text(json.dumps({"name": "7b", "parity": parity}))
    row = {
        "gate": "logits", "quantity": "logits", "worst": 0.0, "limit": 1.0, "source": "none",
        "compared": 1, "where": "nowhere", "passed": True,
    }  # fmt: skip
    seen = {"flips_in_band": 0, "decisions": 0, "margins": {}, "histogram": []}
    figures = {"fit": {}, "rewrite": {}, "behaviour": {}, "engine": "none"}
    figures |= {"parity": {"passed": True, "comparisons": [row], **seen}}
    digests = {
        "model": spec.model.digest,
        "guard": spec.digest,
        "onnx": {DECODER: describe(folder, DECODER).sha256},
    }
    gates = [Gate("presence", "pass", "a structure, not a bake")]
    (folder / CERTIFICATE).write_text(json.dumps(certificate("7b", gates, digests, figures)))
    origins = Origins(
        spec.model.digest, {"fit": "1" * 64}, spec.digest, EngineNotBuilt("not asked"), {}
    )
    return seal_unread(folder, origins)


def seal_unread(folder: Path, origins: Origins) -> int:
    """As `papers.seal`, but with no digest of what verify does not read, either."""
    entries = [
        FileEntry(name, size, "0" * 64) if size >= SMALL else describe(folder, name)
        for name, size in list_files(folder).items()
    ]
    for name, text in papers_of(folder, entries, origins).items():
        (folder / name).write_text(text)
        entries.append(describe(folder, name))
    entries.sort(key=lambda entry: entry.name)
    write_manifest(folder, Manifest(tuple(entries), origins))
    return sum(entry.size for entry in entries)


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(tempfile.mkdtemp()) / "bundle"
    folder.mkdir(parents=True)
    try:
        size = write_bundle(folder)
        started = time.monotonic()
        command = [sys.executable, "-m", "guardbake", "verify", str(folder)]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        seconds = time.monotonic() - started
    finally:
        shutil.rmtree(folder)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(done.stdout + done.stderr, end="")
    print(f"exit {done.returncode}; {size / 1e9:.1f} GB, {seconds:.1f} s on {os.cpu_count()} cores")
    print(f"{used.ru_utime + used.ru_stime:.1f} s of it on a core")


if __name__ == "__main__":
    main()
