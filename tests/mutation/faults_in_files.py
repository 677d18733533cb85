"""Faults in weights, engine record, certificate, golden runs, papers and manifest of a bundle."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from safetensors.numpy import load_file, save_file

from guardbake.bundle.manifest import (
    CERTIFICATE,
    DECODER,
    GUARD,
    MANIFEST,
    manifest_of,
    read_manifest,
    write_manifest,
)
from guardbake.bundle.papers import PROVENANCE, SBOM
from guardbake.site import Site
from guardbake.steps.recheck import GOLDEN

from tests.mutation.bundles import (
    DATA,
    RECORD,
    edited_layers,
    mend,
    rewrite_json,
)
from tests.mutation.fault import Fault

Plant = Callable[[Path], object]


# ---- weights


def projection(bundle: Path, layer: int) -> ir.ExternalTensor:
    """Where the last FFN matrix of a layer lies in the decoder's data file."""
    model = ir.load(bundle / DECODER)
    value = next(
        v for n in model.graph for v in n.outputs if v.name == Site(layer, "ffn_output").onnx_value
    )
    node = value.producer()
    assert node is not None
    tensors = [v.const_value for v in node.inputs if v is not None and v.is_initializer()]
    (tensor,) = [t for t in tensors if isinstance(t, ir.ExternalTensor)]
    return tensor


def in_weights(bundle: Path, layer: int, change: Callable[[np.ndarray], np.ndarray]) -> None:
    tensor, path = projection(bundle, layer), bundle / DATA
    data = bytearray(path.read_bytes())
    start = tensor.offset or 0
    old = np.frombuffer(data, np.float32, tensor.nbytes // 4, start)
    data[start : start + tensor.nbytes] = change(old.copy()).astype(np.float32).tobytes()
    path.write_bytes(data)


def weights(change: Callable[[np.ndarray], np.ndarray], mended: bool = True) -> Plant:
    """Change the FFN matrix of the first guarded layer."""

    def plant(bundle: Path) -> None:
        in_weights(bundle, edited_layers(bundle)[0], change)
        if mended:
            mend(bundle)

    return plant


def swap_matrices(bundle: Path) -> None:
    first, second = edited_layers(bundle)[:2]
    held: dict[int, np.ndarray] = {}
    for layer in (first, second):
        in_weights(bundle, layer, lambda a, at=layer: held.setdefault(at, a))
    in_weights(bundle, first, lambda _: held[second])
    in_weights(bundle, second, lambda _: held[first])
    mend(bundle)


def flip_bit(array: np.ndarray) -> np.ndarray:
    array.view(np.uint32)[7] ^= 1
    return array


def with_nan(array: np.ndarray) -> np.ndarray:
    array[7] = np.nan
    return array


def through_float16(array: np.ndarray) -> np.ndarray:
    """The same weights by way of ten million times their size, past where float16 ends."""
    with np.errstate(over="ignore"):
        return (array * 1e7).astype(np.float16).astype(np.float32) / 1e7


def cut_data(bundle: Path) -> None:
    path = bundle / DATA
    path.write_bytes(path.read_bytes()[:-4096])
    mend(bundle)


def swap_data(bundle: Path) -> None:
    one, two = bundle / DATA, bundle / "vision.onnx.data"
    first, second = one.read_bytes(), two.read_bytes()
    one.write_bytes(second)
    two.write_bytes(first)


def swap_data_and_mend(bundle: Path) -> None:
    swap_data(bundle)
    mend(bundle)


def link_data(bundle: Path) -> None:
    (bundle / DATA).rename(bundle.parent / "elsewhere")
    (bundle / DATA).symlink_to("../elsewhere")


def data_elsewhere(bundle: Path) -> None:
    """The graph takes a matrix from outside the bundle."""
    (bundle.parent / "outside").write_bytes((bundle / DATA).read_bytes())
    model = ir.load(bundle / DECODER)
    name = projection(bundle, edited_layers(bundle)[0]).name
    value = model.graph.initializers[str(name)]
    old = value.const_value
    assert isinstance(old, ir.ExternalTensor)
    value.const_value = ir.ExternalTensor(
        "../outside", old.offset, old.length, old.dtype, shape=old.shape, name=str(name),
        base_dir=bundle,
    )  # fmt: skip
    ir.save(model, bundle / DECODER)
    mend(bundle)


WEIGHTS: tuple[Fault[Path], ...] = (
    Fault("one bit flipped", "weights", "bytes", weights(flip_bit, mended=False)),
    Fault("data files swapped", "weights", "bytes", swap_data),
    Fault("data behind a symbolic link", "weights", "bytes", link_data),
    Fault("data cut short, mended", "weights", "data", cut_data),
    Fault("data files swapped, mended", "weights", "data", swap_data_and_mend),
    Fault("data outside the bundle, mended", "weights", "data", data_elsewhere),
    Fault("matrices of two layers swapped, mended", "weights", "parity", swap_matrices),
    Fault("matrix x 1.01, mended", "weights", "parity", weights(lambda a: a * 1.01)),
    Fault("matrix zero, mended", "weights", "parity", weights(np.zeros_like)),
    Fault("NaN in a matrix, mended", "weights", "parity", weights(with_nan)),
    Fault("matrix past float16's end, mended", "weights", "parity", weights(through_float16)),
)


# ---- engine record


def in_record(change: Callable[[dict[str, Any]], object]) -> Plant:
    def plant(bundle: Path) -> None:
        rewrite_json(bundle / RECORD, change)
        mend(bundle, record=False)

    return plant


def setting(name: str, value: str) -> Plant:
    def change(record: dict[str, Any]) -> None:
        kept = [pair for pair in record["settings"] if pair[0] != name]
        record["settings"] = [*kept, [name, value]]

    return in_record(change)


def other_engine(bundle: Path) -> None:
    path = bundle / RECORD.removesuffix(".json")
    path.write_bytes(path.read_bytes()[:-1] + b"\0")
    mend(bundle)


def no_record(bundle: Path) -> None:
    (bundle / RECORD).write_text("[]")
    mend(bundle, record=False)


ENGINE: tuple[Fault[Path], ...] = tuple(
    Fault(name, "engine record", "engine", plant)
    for name, plant in {
        "stale: of an earlier graph": in_record(lambda r: r.update(onnx_sha256="0" * 64)),
        "stale: of other weights": in_record(lambda r: r["data_sha256"][0].__setitem__(1, "0")),
        "of another guard": in_record(lambda r: r.update(guard_digest="0" * 64)),
        "of another engine file": other_engine,
        "TF32 on": setting("TF32", "True"),
        "NaNs not kept": setting("STRICT_NANS", "False"),
        "a guard node without layers": in_record(lambda r: r["guard"][-1].update(layers=[])),
        "a guard node not mentioned": in_record(lambda r: r["guard"].pop(0)),
        "an engine that claims to have run": in_record(lambda r: r.update(status="ran")),
        "no record inside": no_record,
    }.items()
)


# ---- certificate and golden runs


def in_certificate(change: Callable[[dict[str, Any]], object]) -> Plant:
    def plant(bundle: Path) -> None:
        rewrite_json(bundle / CERTIFICATE, change)
        write_manifest(bundle, manifest_of(bundle, read_manifest(bundle).origins))

    return plant


def rewrite_golden(bundle: Path, arrays: dict[str, np.ndarray], **meta: str) -> None:
    data = (bundle / GOLDEN).read_bytes()
    before = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
    save_file(load_file(bundle / GOLDEN) | arrays, bundle / GOLDEN, before | meta)
    mend(bundle)


def golden_of_another_guard(bundle: Path) -> None:
    rewrite_golden(bundle, {}, guard="0" * 64)


def in_golden(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Plant:
    def plant(bundle: Path) -> None:
        array = load_file(bundle / GOLDEN)[name]
        rewrite_golden(bundle, {name: change(array.reshape(-1)).reshape(array.shape)})

    return plant


def moved(array: np.ndarray) -> np.ndarray:
    return array + np.float32(0.01)


CERTIFIED: tuple[Fault[Path], ...] = (
    Fault(
        "verdict fail", "certificate", "certificate",
        in_certificate(lambda c: c.update(verdict="fail")),
    ),
    Fault(
        "of another guard", "certificate", "certificate",
        in_certificate(lambda c: c["digests"].update(guard="0" * 64)),
    ),
    Fault(
        "of other graphs", "certificate", "certificate",
        in_certificate(lambda c: c["digests"]["onnx"].update({DECODER: "0" * 64})),
    ),
    Fault("of another guard", "golden runs", "canary", golden_of_another_guard),
    Fault("a recorded score moved", "golden runs", "canary", in_golden("vectors.scores", moved)),
    Fault(
        "NaN in a golden vector", "golden runs", "canary",
        in_golden("vectors.reached.layers.4.ffn_output", lambda a: a * np.float32(np.nan)),
    ),
    Fault(
        "logits of another run", "golden runs", "parity",
        in_golden("batch 0.trace.step_logits", moved),
    ),
)  # fmt: skip


# ---- papers


def in_paper(name: str, change: Callable[[dict[str, Any]], object]) -> Plant:
    def plant(bundle: Path) -> None:
        rewrite_json(bundle / name, change)
        write_manifest(bundle, manifest_of(bundle, read_manifest(bundle).origins))

    return plant


def no_provenance(bundle: Path) -> None:
    (bundle / PROVENANCE).unlink()
    write_manifest(bundle, manifest_of(bundle, read_manifest(bundle).origins))


PAPERS: tuple[Fault[Path], ...] = tuple(
    Fault(name, "papers", "papers", plant)
    for name, plant in {
        "a component left out, mended": in_paper(SBOM, lambda c: c["components"].pop()),
        "a better figure, mended": in_paper(
            SBOM,
            lambda c: c["metadata"]["component"]["modelCard"]["quantitativeAnalysis"][
                "performanceMetrics"
            ][0].update(value="1.0000"),
        ),
        "another source model, mended": in_paper(
            PROVENANCE,
            lambda c: c["predicate"]["buildDefinition"]["resolvedDependencies"][0].update(
                digest={"guardbakeModel": "0" * 64}
            ),
        ),
        "another recipe, mended": in_paper("recipe.json", lambda c: c.update(batch_size=1)),
        "no provenance, mended": no_provenance,
    }.items()
)


# ---- manifest


def in_manifest(change: Callable[[dict[str, Any]], object], canonical: bool = True) -> Plant:
    def plant(bundle: Path) -> None:
        content = json.loads((bundle / MANIFEST).read_text())
        change(content)
        text = json.dumps(content, sort_keys=True, indent=2 if canonical else None) + "\n"
        (bundle / MANIFEST).write_text(text)

    return plant


def entry(content: dict[str, Any], name: str) -> dict[str, Any]:
    return next(e for e in content["files"] if e["name"] == name)


def swap_entries(content: dict[str, Any]) -> None:
    one, two = entry(content, DATA), entry(content, "vision.onnx.data")
    for key in ("sha256", "size"):
        one[key], two[key] = two[key], one[key]


def other_guard(bundle: Path) -> None:
    """The chain states a guard that is not the one in the bundle, and so does the certificate."""
    mend(bundle, guard="0" * 64)


def other_model(bundle: Path) -> None:
    origins = replace(read_manifest(bundle).origins, model="0" * 64)
    write_manifest(bundle, manifest_of(bundle, origins))


MANIFESTS: tuple[Fault[Path], ...] = (
    *(
        Fault(name, "manifest", "bytes", plant)
        for name, plant in {
            "digest of another file": in_manifest(
                lambda c: entry(c, GUARD).update(sha256="0" * 64)
            ),
            "entries swapped": in_manifest(swap_entries),
            "entry dropped": in_manifest(lambda c: c["files"].pop(0)),
            "a name that leaves the folder": in_manifest(
                lambda c: c["files"][0].update(name="../x")
            ),
            "link of the chain cut": in_manifest(lambda c: c["chain"].pop("samples")),
            "chain of another graph": in_manifest(
                lambda c: c["chain"]["onnx"].update({DECODER: "0" * 64})
            ),
            "another spelling": in_manifest(lambda _: None, canonical=False),
            "extra file": lambda bundle: (bundle / "extra").write_bytes(b"x"),
            "missing file": lambda bundle: (bundle / GOLDEN).unlink(),
            "manifest cut short": lambda bundle: (bundle / MANIFEST).write_bytes(
                (bundle / MANIFEST).read_bytes()[:-40]
            ),
        }.items()
    ),
    Fault("chain of another guard, mended", "manifest", "pack", other_guard),
    Fault("chain of another model, mended", "manifest", "pack", other_model),
)
FAULTS: tuple[Fault[Path], ...] = (*WEIGHTS, *ENGINE, *CERTIFIED, *PAPERS, *MANIFESTS)
